"python -m sdlearn.pocket train | evaluate | card"
from .evaluate import main

if __name__=='__main__': main()
