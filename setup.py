"Package metadata, all of it read from settings.ini"
from configparser import ConfigParser
from pathlib import Path
import re, shlex
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf8')
said = ini['DEFAULT']

def from_anywhere(text): # links of the README, as they are seen from a package index
    url = said['git_url'].strip().rstrip('/')
    if not url: return text
    def there(m): return f"{m[1]}]({url}/{'raw' if m[1].startswith('!') else 'blob'}/{said['branch']}/{m[2]})"
    return re.sub(r'(!?\[[^\]]*)\]\((?!http|#)([^)]+)\)', there, text)

setup(
    name=said['lib_name'], version=said['version'], description=said['description'],
    license='Apache-2.0', license_files=['LICENSE', 'NOTICE'],
    author=said['author'], author_email=said['author_email'] or None,
    project_urls={'Repository': said['git_url']} if said['git_url'] else {},
    keywords=said['keywords'].split(),
    long_description=from_anywhere((here/'README.md').read_text(encoding='utf8')),
    long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Education',
                 'Natural Language :: English', 'Programming Language :: Python :: 3',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=['sdlearn', 'sdlearn.*']),
    include_package_data=True, zip_safe=False,
    package_data={'sdlearn': ['atlas/*', 'web/*', 'idea/digits.webp', 'adapt/study.json', 'checkpoint/**/*', 'checkpoint/*']},
    python_requires='>='+said['min_python'], install_requires=shlex.split(said['requirements']),
    extras_require={k: shlex.split(said[f'{k}_requirements']) for k in ('dev', 'docs', 'browser', 'export')},
    entry_points={'console_scripts': shlex.split(said['console_scripts'])},
)
