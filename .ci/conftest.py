"--half 0 and --half 1: every second check, so that two cores share them"

def pytest_addoption(parser): parser.addoption('--half', type=int, choices=(0, 1), default=None)

def pytest_collection_modifyitems(config, items):
    half = config.getoption('--half')
    if half is None: return
    config.hook.pytest_deselected(items=items[1-half::2])
    items[:] = items[half::2]
