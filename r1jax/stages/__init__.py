"""The kinds of stages.

A kind is a subclass of `r1jax.settings.stage.Stage` and a module with three functions (the one that
`FUNCTIONS` names, or that defines the class):

    check(stage, run: ResolvedRun)    raises ValueError for what the stage could not do later. It is
                                      called for all stages before any of them computes.
    programs(stage, planning)         what the stage compiles and keeps in memory: used by its own
                                      loop, by `--dry-run` and by `plan`.
    run(stage, run: StageRun)         does the work, going on where a former process stopped. It
                                      ends with `run.record.mark(stage, "done", seconds)`; a train
                                      stage leaves its weights in `run.files.trained(stage.name)`,
                                      which `TrainLoop.finish` does, a stage that writes a dataset
                                      `dataset.jsonl` in `run.directory`, an evaluation
                                      `summary.json`.

The built-in kinds are folders of settings.py (no JAX) and stage.py, and a line in
`r1jax.settings.kinds`. Any other one may be a single file: `kind: my_package.my_module:MyStage`.
"""
