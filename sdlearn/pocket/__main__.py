"python -m sdlearn.pocket train | student | evaluate | card | atlas"
import sys

def run(argv):
    "Making the atlas needs neither torch nor a checkpoint, so it stands apart"
    if argv[:1]==['atlas']:
        from .emoji import main
        return main(argv[1:])
    from .evaluate import main
    return main(argv)

if __name__=='__main__': run(sys.argv[1:])
