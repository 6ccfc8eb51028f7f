"The small Stable Diffusion in this package: its data, its recipe, its numbers"
from importlib import import_module as _load

_home = dict(subjects='atlas', unseen='atlas', held_out='scenes', render='scenes', Scene='scenes')
__all__ = [*_home]

def __dir__(): return sorted({*globals(), *_home})

def __getattr__(name):
    if name in _home: return getattr(_load('sdlearn.pocket.'+_home[name]), name)
    raise AttributeError(f"module 'sdlearn.pocket' has no attribute {name!r}; it has {', '.join(_home)}")
