"""Judge which of two models answers better: `python judge.py a=FILE b=FILE judge=model judge_model=NAME output=FILE`.

Without `b`, a reward model scores the responses of `a`.
"""

if __name__ == "__main__":  # before the imports that take seconds, so that Ctrl-C ends them
    from basics.interrupts import let_interrupts_end_the_process

    let_interrupts_end_the_process()

import functools

from commands import command_line
from evaluation.judge import run

main = functools.partial(command_line.main, run, "judge")

if __name__ == "__main__":
    main()
