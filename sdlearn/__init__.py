"Stable Diffusion, every piece opened; names and rooms load on first use, so importing is light"
__version__ = "0.1.0"
from importlib import import_module as _load
from pkgutil import iter_modules as _rooms

_home = dict(load_sd='load', txt2img='pipeline', img2img='pipeline', inpaint='pipeline',
             generate_with_embs='pipeline')
__all__ = [*_home]

def __dir__(): return sorted({*globals(), *_home, *(r.name for r in _rooms(__path__))})

def __getattr__(name):
    if name in _home: return getattr(_load('sdlearn.'+_home[name]), name)
    if any(r.name==name for r in _rooms(__path__)): return _load('sdlearn.'+name)
    raise AttributeError(f"module 'sdlearn' has no attribute {name!r}; it has {', '.join(_home)}")
