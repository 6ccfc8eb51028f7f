"Package metadata, all of it read from settings.ini"
from configparser import ConfigParser
from pathlib import Path
import shlex
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters=['=']); ini.read(here/'settings.ini', encoding='utf8'); cfg = ini['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0', license_files=['LICENSE', 'NOTICE'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'].split(),
    long_description=(here/'README.md').read_text(encoding='utf8'), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Education', 'Natural Language :: English',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=['sdlearn', 'sdlearn.*']), include_package_data=True, zip_safe=False,
    package_data={'sdlearn': ['atlas/*', 'checkpoint/**/*', 'checkpoint/*']},
    python_requires='>='+cfg['min_python'], install_requires=shlex.split(cfg['requirements']),
    extras_require={'dev': shlex.split(cfg['dev_requirements'])}, entry_points={'console_scripts': shlex.split(cfg['console_scripts'])},
)
