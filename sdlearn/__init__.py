__version__ = "0.1.0"

_home = dict(load_sd='load', txt2img='pipeline', img2img='pipeline', inpaint='pipeline', generate_with_embs='pipeline')
__all__ = [*_home]

def __getattr__(name):
    "Names load on first use, so that `import sdlearn` is light"
    from importlib import import_module
    if name in _home: return getattr(import_module('sdlearn.'+_home[name]), name)
    raise AttributeError(f"module 'sdlearn' has no attribute {name!r}; it has {', '.join(_home)}")
