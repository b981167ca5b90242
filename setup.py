"Everything here is read from settings.ini, the one place where versions and requirements are written."
import os, shutil, subprocess
from configparser import ConfigParser
from pathlib import Path
from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.bdist_wheel import bdist_wheel

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

def compiler():
    "A C compiler, None where there is none or NATIVEBIT_PURE=1 asks for a wheel without compiled code."
    if os.environ.get('NATIVEBIT_PURE') == '1' or os.name != 'posix': return None
    return next((p for c in (os.environ.get('CC'), 'cc', 'gcc', 'clang') if c and (p := shutil.which(c))), None)

class with_library(with_checkpoint):
    "And, where there is a C compiler, the CPU kernels; without one they are left out, and the package says at run time how to get them."
    def run(self):
        super().run()
        source, there = here/'nativebit'/'kernels'/'cpu.c', Path(self.build_lib)/'nativebit'/'kernels'/'_cpu.so'
        if self.editable_mode or not compiler(): return
        flags = source.open(encoding='utf-8').readline().split()[2:]   # the first line says how
        r = subprocess.run([compiler(), *flags, str(source), '-o', str(there), '-lm'], capture_output=True, text=True)
        if r.returncode: there.unlink(missing_ok=True); print(f'note: a wheel without the CPU kernels, as {compiler()} failed: {r.stderr[-500:]}')

class for_any_python(bdist_wheel):
    "The library knows nothing of Python: one wheel for all versions, and with it for one platform."
    def get_tag(self): return ('py3', 'none', super().get_tag()[2])

class Compiled(Distribution):
    "Its files belong to one platform, where there is a library among them."
    def has_ext_modules(self): return bool(compiler())

cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
readme = here/'README.md'

setup(
    distclass=Compiled, name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='MIT', url=cfg['git_url'],
    packages=find_packages(include=['nativebit', 'nativebit.*']), include_package_data=True,
    package_data={'nativebit': ['assets/*'], 'nativebit.kernels': ['*.cu', '*.cuh', '*.c', '*.h', 'configs/*.json']},
    classifiers=['License :: OSI Approved :: MIT License', 'Programming Language :: Python :: 3'],
    entry_points={'console_scripts': ['nativebit = nativebit.__main__:main'], 'vllm.general_plugins': ['nativebit = nativebit.serving.vllm:register']},
    cmdclass=dict(build_py=with_library, bdist_wheel=for_any_python), python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown', zip_safe=False)
