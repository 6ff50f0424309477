"""Evaluate a run's checkpoints, or any model: `python evaluate.py run=RUN`, with the keys of train.py."""

if __name__ == "__main__":  # before the imports that take seconds, so that Ctrl-C ends them
    from basics.interrupts import let_interrupts_end_the_process

    let_interrupts_end_the_process()

import functools

from omegaconf import DictConfig

from commands import command_line
from commands.run_config import check_hub_models, run_with_options
from evaluation.evaluate import Options, evaluate_checkpoints, make_options


def run(config: DictConfig):
    """Check the config, then evaluate."""
    run_with_options(config, "evaluate", make_options, _evaluate)


def _evaluate(config: DictConfig, options: Options, given: list[str]):
    from trainers import make_trainer  # takes seconds to import

    trainer = make_trainer(config, purpose="evaluate")
    check_hub_models(config, options.checkpoints, given)
    evaluate_checkpoints(trainer, options)


main = functools.partial(command_line.main, run, "evaluate")

if __name__ == "__main__":
    main()
