"""Draw responses from a run's checkpoints, or from any model: `python sample.py run=RUN`, with the keys of train.py."""

if __name__ == "__main__":  # before the imports that take seconds, so that Ctrl-C ends them
    from basics.interrupts import let_interrupts_end_the_process

    let_interrupts_end_the_process()

import functools

from omegaconf import DictConfig

from commands import command_line
from commands.run_config import check_hub_models, run_with_options
from evaluation.sample_options import Options, make_options


def run(config: DictConfig):
    """Check the config, then draw samples."""
    run_with_options(config, "sample", make_options, _sample)


def _sample(config: DictConfig, options: Options, given: list[str]):
    from evaluation.sample import sample_checkpoints  # takes seconds to import
    from trainers import make_trainer

    def load():
        trainer = make_trainer(config, purpose="evaluate" if options.prompts is None else "sample")
        check_hub_models(config, [file.checkpoint for file in options.files], given)
        return trainer

    sample_checkpoints(load, config, options)


main = functools.partial(command_line.main, run, "sample")

if __name__ == "__main__":
    main()
