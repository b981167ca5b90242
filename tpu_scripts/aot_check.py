"Does a run fit a TPU slice? Compiled here, without one: python tpu_scripts/aot_check.py --config tpu-2b --topology v6e:2x4 (--help: the rest)."
from nativebit.train.aot import main
from nativebit.utils.cli import one_sentence, parse_args

if __name__ == '__main__':
    with one_sentence(): main(**parse_args(main))
