"""Train a language model with SFT, DPO or IPO: `python train.py model=tiny datasets=[toy] loss=sft`."""

import contextlib
import gc
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from glob import has_magic

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from checkpointing import fingerprints
from checkpointing.preemption import EXIT_CODE, SIGNALS, Stopped
from checkpointing.resume import (
    SWEEP_DIR,
    changed_inputs,
    check_same_run,
    find_checkpoint,
    is_complete,
    locate_run,
    refuse_changed_inputs,
    resume_command,
    resume_hint,
)
from commands.output import keep_output_going, quiet_libraries
from commands.run_directory import claimed
from commands.sweeps import SweepLog, in_sweep, job_name, job_overrides
from config_checks.checks import check_config
from config_checks.explanations import explain_flags, explain_hydra_error
from config_checks.schema import CONFIG_DIR, FREE_KEYS, REPOSITORY, changed_keys
from distributed import collectives, environment, launch
from distributed.strategies import STRATEGIES
from losses import LOSSES
from preference_datasets import DATASETS, ROWS, chosen_datasets, open_batches
from reporting.run_log import check_log_files
from utils import UserError, get_local_dir, get_local_run_dir, on_rank0, rank0_print

# asked for by HYDRA_FULL_ERROR=1, which `main` then sets for reasons of its own; workers ask their parent's
SHOWS_TRACEBACK = os.environ.setdefault("DPO_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0")) == "1"


def default_run_dir(exp_name: str, local_dirs: list[str]) -> str:
    """The default of `local_run_dir`: a new path, or the directory of a sweep's job."""
    return HydraConfig.get().runtime.output_dir if in_sweep() else get_local_run_dir(exp_name, local_dirs)


OmegaConf.register_new_resolver("get_local_run_dir", default_run_dir, replace=True)
OmegaConf.register_new_resolver("get_local_dir", get_local_dir, replace=True)
OmegaConf.register_new_resolver("sweep_job", job_name, replace=True)
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)


def create_run_dir(config: DictConfig, inputs: dict[str, str] | None = None):
    """Create the run directory with the config in it; nothing before this writes anything but caches and a lock.

    Args:
        inputs: fingerprints of what the run starts from.
    """
    path = os.path.join(config.local_run_dir, "config.yaml")
    try:
        os.makedirs(config.local_run_dir, exist_ok=True)
        with open(f"{path}.partial-new", "w", encoding="utf-8") as file:
            file.write(fingerprints.header(inputs or {}) + OmegaConf.to_yaml(config))
        os.replace(f"{path}.partial-new", path)
    except OSError as error:
        raise UserError(f"local_run_dir={config.local_run_dir}: can't write there: {error}") from error
    print("=" * 80)
    print(f"Writing to {socket.gethostname()}:{config.local_run_dir}")
    print("=" * 80, flush=True)


def compose_config(*overrides: str) -> DictConfig:
    """The config that the command line would give `run`, for use from Python: `run(compose_config("model=tiny"))`.

    Raises: Hydra's errors for keys and values that can't be.
    """
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = hydra.compose("config", with_free_keys(list(overrides)), return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # what names and directories are made of
    with open_dict(config):
        del config["hydra"]
    return config


def run(config: DictConfig):
    """Check the config, then train: in this process, in several that it starts, or as one of a launcher's."""
    run_dir_given = is_run_dir_given(config)
    OmegaConf.to_container(config, resolve=True)  # where an interpolation fails this names the key, `resolve` doesn't
    OmegaConf.resolve(config)
    if in_sweep() and "exp_name" not in (varied := job_overrides()):  # wandb tells jobs apart by their names
        config.exp_name = " ".join([str(config.exp_name), *(f"{key}={value}" for key, value in varied.items())])
    with contextlib.ExitStack() as stack:
        enter_process_group(config, stack)
        prepared = (config, *prepare(config, run_dir_given, stack)) if on_rank0() else None
        config, checkpoint, complete, files = collectives.broadcast_object(prepared)
        if complete:
            rank0_print(f"This run is complete: {checkpoint}")
            return
        if config.data_only:
            if on_rank0():
                report_data(config)
            return
        has_workers = STRATEGIES[config.trainer].starts_workers and not environment.is_launched()
        # where they end without a word, say how to go on; otherwise what fails later says so itself
        with resume_hinted(config.local_run_dir, UserError) if has_workers else contextlib.nullcontext():
            start_workers_or(train_from, config, checkpoint, files)


def enter_process_group(config: DictConfig, stack: contextlib.ExitStack):
    """Connect this process with the others, if a launcher has started it, for as long as `stack` is entered."""
    if environment.is_launched():
        stack.enter_context(launch.process_group(config.worker_timeout))


def start_workers_or(work: Callable, config: DictConfig, *args):
    """`work(config, *args)` in the workers that the trainer needs, or here if a launcher has started them or there is
    one process alone."""
    starts_workers = STRATEGIES[config.trainer].starts_workers
    if environment.is_launched() or not starts_workers:
        work(config, *args)
        return
    world_size = environment.get_world_size(starts_workers, config.world_size)
    launch.run_workers(_as_worker, world_size, config.fsdp_port, ROWS, work, config, *args)


def _as_worker(rows: dict[str, list[dict]], work: Callable, config: DictConfig, *args):
    """`rows`: what `ROWS` holds in the process that has started this one."""
    keep_output_going()
    ROWS.update(rows)
    with errors_reported(), launch.process_group(config.worker_timeout):
        work(config, *args)


def is_run_dir_given(config: DictConfig) -> bool:
    """Whether `local_run_dir` is one that will be the same the next time."""
    if "get_local_run_dir:" not in str(OmegaConf.to_container(config, resolve=False)["local_run_dir"]):
        return True
    return in_sweep() and any(word.startswith("hydra.sweep.dir=") for word in HydraConfig.get().overrides.hydra)


def prepare(
    config: DictConfig, run_dir_given: bool, stack: contextlib.ExitStack
) -> tuple[str | None, bool, dict[str, str]]:
    """Check the config, claim the run directory for as long as `stack` is entered.

    Returns: the checkpoint to go on from, whether there is nothing left to do, and fingerprints of the files that the
        run starts from.
    """
    reference_dtype_given = OmegaConf.select(config, "model.reference_dtype") is not None
    check_config(config)
    locate_run(config, run_dir_given)
    stack.enter_context(claimed(config.local_run_dir))
    check_log_files(config.local_run_dir)
    checkpoint, files = find_checkpoint(config), fingerprints.file_fingerprints(config)
    if config.resume is not None:
        check_same_run(config, checkpoint, files, reference_dtype_given)
    changed = OmegaConf.to_yaml(OmegaConf.create(changed_keys(config)))
    print(f"Config, where it isn't the default (all of it will be in config.yaml):\n{textwrap.indent(changed, '  ')}")
    return checkpoint, checkpoint is not None and is_complete(config, checkpoint), files


def report_data(config: DictConfig):
    """Read and check all data, and say what there is; no model is loaded."""
    from data import hub
    from models import allow_own_code, load_tokenizer

    hub.use_cache_if_unreachable(hub_names(config))
    allow_own_code(config)
    loss = LOSSES[config.loss.name]
    open_batches(
        config,
        load_tokenizer(config),
        not loss.needs_pairs,
        config.seed,
        (0, 1),
        False,
        mismatched=loss.takes_kl_estimate,
    )
    print("data_only=true: nothing is trained")


def make_trainer(config: DictConfig, trains: bool = True):
    """Load all that the config names: tokenizer, data, policy and reference; without `trains` no training data."""
    import trainers
    from data import hub
    from models import allow_own_code, load_policy, load_reference

    quiet_libraries()
    hub.use_cache_if_unreachable(hub_names(config))
    allow_own_code(config)
    trainer_class = getattr(trainers, config.trainer)
    device_map = trainer_class.strategy_class.device_map
    # on its way to several workers the policy is emptied, and there is nothing to copy
    copied: list[nn.Module] = []

    def policy() -> nn.Module | None:
        model = load_policy(config, device_map) if environment.is_local_rank0() else None
        copied.extend([model] if device_map == "balanced" and model is not None else [])
        return model

    def reference_model() -> nn.Module | None:  # where one is needed
        first = copied[0] if copied else None
        return load_reference(config, first, device_map) if environment.is_local_rank0() else None

    return trainer_class(
        policy, config, config.seed, config.local_run_dir, reference_model, *collectives.rank_and_world_size(), trains
    )


def train_from(config: DictConfig, checkpoint: str | None, files: dict[str, str]):
    """Load what the run starts with, then the checkpoint if there is one, and train to the end."""
    trainer = make_trainer(config)
    trainer.state.inputs = {**files, **check_loaded(config, checkpoint, trainer)}
    run_dir = config.local_run_dir
    with trainer.stop:
        with resume_hinted(run_dir, Stopped):
            trainer.precompute_reference()
            if checkpoint is not None:
                trainer.resume(checkpoint)
        if trainer.state.complete:
            rank0_print(f"This run is complete: {checkpoint}")
            return
        if on_rank0():
            create_run_dir(config, trainer.state.inputs)
        with resume_hinted(run_dir, Exception):
            trainer.train()
            trainer.save()


def hub_names(config: DictConfig) -> list[str]:
    """What a run loads by name: ids on the hub or, as they may be, local folders."""
    model, reference = config.model, config.reference_model
    names = [model.name_or_path, model.tokenizer_name_or_path, model.archive, reference.name_or_path, reference.archive]
    for choice in chosen_datasets(config):
        is_local = choice.name in ROWS or os.path.exists(os.path.expanduser(choice.name)) or has_magic(choice.name)
        if choice.is_named:
            names.append(config.dataset_paths.get(choice.name) or DATASETS[choice.name].hub_id)
        elif not is_local:
            names.append(choice.name.partition(":")[0])
    return [name for name in names if name is not None]


def check_loaded(config: DictConfig, checkpoint: str | None, trainer) -> dict[str, str]:
    """Refuse to go on with a run on other data than it began with; rank 0 decides for all.

    Returns: fingerprints of the data, and of what has been loaded from the hub.
    """
    loaded, changed = {}, []
    if on_rank0():
        loaded = {**fingerprints.hub_revisions(config), **trainer.data_fingerprints()}
        changed = changed_inputs(config, checkpoint, loaded)
    loaded, changed = collectives.broadcast_object((loaded, changed))
    refuse_changed_inputs(config, changed)
    return loaded


@contextlib.contextmanager
def resume_hinted(run_dir: str, error_class: type[Exception]) -> Iterator[None]:
    """Let errors of this class that end a run say how to go on with it."""
    try:
        yield
    except error_class as error:
        error.add_note(resume_hint(run_dir))
        raise


def with_free_keys(overrides: list[str]) -> list[str]:
    """The overrides, so marked that Hydra takes keys it doesn't know where names are not ours to know."""
    return [f"++{word}" if word.startswith((*FREE_KEYS, "judge_args", "engine_args")) else word for word in overrides]


@contextlib.contextmanager
def errors_reported() -> Iterator[None]:
    """Let errors end the process (SystemExit) once they have been printed, a bug's with its traceback.

    A user's mistake, a lost connection and a signal are told in a message alone.
    """
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        launch.wait_for_root_cause(error)
        if SHOWS_TRACEBACK:
            raise
        message = str(error) if isinstance(error, UserError) else explain_hydra_error(error)
        sys.exit("\n".join([f"error: {message}", *getattr(error, "__notes__", [])]))
    except Stopped as stopped:
        rank0_print("\n".join([f"stopped by {stopped}", *getattr(stopped, "__notes__", [])]), file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        is_consequence = launch.is_lost_connection(error)
        if is_consequence and environment.is_local_rank0():
            message = f"error: another worker is gone ({str(error)[:200]}); what it or its launcher printed says why"
            print("\n".join([message, *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)
        launch.wait_for_root_cause(error)
        if SHOWS_TRACEBACK:
            raise
        if not is_consequence:
            traceback.print_exc()
        sys.exit(1)


class Sweep:
    """The jobs of a sweep (`-m`), one after the other: one that fails doesn't stop the others, a signal stops all."""

    def __init__(self):
        self.log: SweepLog | None = None
        self.run_dirs: set[str] = set()
        self.complete = True
        self.stack = contextlib.ExitStack()

    def start(self):
        """Begin with the first job: only now the directory is known."""
        self.directory = os.path.abspath(HydraConfig.get().sweep.dir)
        os.environ[SWEEP_DIR] = self.directory
        self.log = SweepLog(self.directory)
        self.stack.enter_context(_exit_on_signal())

    def run_job(self, config: DictConfig):
        """Run a job and record how it ended; its errors are printed here.

        Raises: SystemExit if a signal asked for it.
        """
        if self.log is None:
            self.start()
        overrides, start = " ".join(f"{key}={value}" for key, value in job_overrides().items()), time.monotonic()
        rank0_print(f"\n== Job {HydraConfig.get().job.num} of the sweep: {overrides}")
        run_dir, status = HydraConfig.get().runtime.output_dir, "failed"
        try:
            with errors_reported():
                run_dir = self._claimed_dir(config)
                run(config)
            status = "complete"
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr, flush=True)
            status = "stopped" if error.code == EXIT_CODE else "failed"
            if status == "stopped" or environment.is_launched():  # whose other workers could not follow
                raise
        finally:
            self.complete &= status == "complete"
            if on_rank0():
                self.log.add(run_dir, overrides, status, time.monotonic() - start)
            gc.collect()  # a trainer is full of cycles, and its memory is the next one's

    def _claimed_dir(self, config: DictConfig) -> str:
        """The directory of a job, which no other job has had."""
        if config.resume not in (None, "auto"):
            raise UserError(
                f"resume={config.resume}: a sweep goes on with all its jobs by resume=auto and hydra.sweep.dir=DIR"
            )
        if environment.is_launched_by_user() and not is_run_dir_given(config):
            raise UserError("a sweep under a launcher needs hydra.sweep.dir=DIR, the same for all workers")
        run_dir = os.path.abspath(config.local_run_dir)
        if run_dir in self.run_dirs:
            raise UserError(
                f"local_run_dir={run_dir}: an earlier job of this sweep wrote there; leave local_run_dir out, or let "
                "it depend on what the sweep varies"
            )
        self.run_dirs.add(run_dir)
        return run_dir

    def report(self):
        """Print the table of jobs and, if some are not complete, how to go on."""
        self.stack.close()
        if self.log is None:
            return
        rank0_print(f"\n== The sweep in {self.directory}\n{self.log.table()}")
        rank0_print(f"\nTo compare its runs: python -m reporting.compare {shlex.quote(self.directory)}")
        if not self.complete:
            command = resume_command({"hydra.sweep.dir": self.directory, "resume": "auto"})
            rank0_print(f"To go on with what is not complete: {command}", file=sys.stderr)


@contextlib.contextmanager
def _exit_on_signal() -> Iterator[None]:
    """Let a signal that comes while a job of a sweep loads end the sweep as one that comes while it trains."""

    def end(_number: int, _frame):
        for child in multiprocessing.active_children():
            child.kill()
        sys.exit(EXIT_CODE)

    former = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@launch.exit_code_kept()
def main(function: Callable[[DictConfig], None] = run, config_name: str = "config"):
    """Call a function with the config, under Hydra. A user's mistake ends with its message alone; HYDRA_FULL_ERROR=1
    shows where it was noticed."""
    keep_output_going()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra hands every error on as it is
    sys.argv[1:] = with_free_keys(sys.argv[1:])
    sweep = Sweep()

    def job(config: DictConfig):
        if in_sweep():
            if function is not run:
                sys.exit("error: -m sweeps over train.py alone")
            sweep.run_job(config)
            return
        with errors_reported():  # above errors that reach Hydra it prints a line of its own
            function(config)

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(job)()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except SystemExit as error:
        if error.code == 2:  # of Hydra's parser of options
            print(explain_flags(sys.argv[1:]), file=sys.stderr)
        raise
    except Exception as error:  # of Hydra composing what was typed, as jobs report their own
        if SHOWS_TRACEBACK:
            raise
        sys.exit(f"error: {explain_hydra_error(error, config_name)}")
    finally:
        sweep.report()
    if not sweep.complete:
        sys.exit(1)


if __name__ == "__main__":
    main()
