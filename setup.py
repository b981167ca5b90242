"Everything here is read from settings.ini, the one place where versions and requirements are written."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent

class with_checkpoint(build_py):
    "A wheel also holds the demo's checkpoint."
    def run(self):
        super().run()
        if self.editable_mode or not (here/'data'/'stdlib').is_dir(): return
        there = Path(self.build_lib)/'nativebit'/'assets'/'stdlib'
        self.mkpath(str(there))
        for name in 'model.safetensors', 'meta.json', 'tokenizer.json':
            self.copy_file(str(here/'data'/'stdlib'/name), str(there/name))
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
readme = here/'README.md'

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='MIT', url=cfg['git_url'],
    packages=find_packages(include=['nativebit', 'nativebit.*']), include_package_data=True,
    package_data={'nativebit': ['assets/*'], 'nativebit.kernels': ['*.cu', '*.cuh', 'configs/*.json']},
    classifiers=['License :: OSI Approved :: MIT License', 'Programming Language :: Python :: 3'],
    entry_points=dict(console_scripts=['nativebit = nativebit.__main__:main']),
    cmdclass=dict(build_py=with_checkpoint), python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown', zip_safe=False)
