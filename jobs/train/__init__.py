"""Training on a Ray cluster: driver -> workers -> checkpoints.

**Driver** (``train_job.py``). `train_job.main` opens the run directory. For a new run it counts the pairs, writes the feature
cache where one is configured (``feature_cache.py``), and makes the initial model; for a resumed one it reads what the run was
started with. It starts the monitor actor (``monitor.py``), builds Ray's `TorchTrainer`, and hands it to the supervisor
(``supervisor.py``): Ray trains in a thread, while the main thread polls the monitor, shows progress and handles Ctrl-C.

**Readers** (``ray_data.py``). Tasks of Ray Data read shards, decode images, tokenize texts, and deal the batches out to the
workers in the order of the steps. The order follows from the seed and the step alone, whatever the number of workers.

**Workers** (``worker.py``). Each runs the training loop of ``vilseg.training`` on its part of every batch. Gradients are averaged
by torch's DDP or FSDP; ``process_group.py`` selects the network interface where several machines have no GPUs. Rank 0 reports
metrics to the monitor and the metrics file, and writes checkpoints and the model (``reporting.py``).

**Checkpoints** (``vilseg.training.checkpoints``) are written to the run directory beside the training, by a thread of rank 0. The
manifest comes last: a checkpoint without it does not count, so every restart finds a complete one.

When something is lost:

- *A worker dies.* Ray Train stops the others and starts all again, at most ``trainer.max_failures`` times (``train_job.py``).
  Readers and workers both start from the last checkpoint, so the run has the losses of one that never stopped.
- *A machine is lost, or one is added.* With a fixed ``trainer.workers`` it is a worker that dies. With a range, every
  trainer has as many workers as fit now: ``elastic.py`` waits for free room, and stops a run with a checkpoint when more
  workers would fit.
- *The driver dies.* Its actors and workers end with it. ``vilseg train --resume`` continues from the last checkpoint. The first
  Ctrl-C or SIGTERM leaves a checkpoint; the second one stops at once (``supervisor.py``).
- *The object store does not answer.* Reads and writes are retried (``vilseg.storage``). Training goes on while a checkpoint waits
  for the store, until the next checkpoint is due.
- *Pairs cannot be read.* The monitor counts them, and ends the run when they exceed ``data.max_bad_share``; their keys are
  written to ``quarantine.jsonl`` (``supervisor.py``).
- *The input or the configuration is wrong, or the loss is not finite.* A restart would not help. The worker passes the error to
  the monitor, restarted workers return at once, and the supervisor raises the error on the driver.
"""
