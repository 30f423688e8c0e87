"""Training on a Ray cluster: driver -> workers -> checkpoints.

**Driver** (``train_job.py``). `train_job.main` opens the run directory. For a new run it counts the pairs, writes the feature
cache if one is configured (``feature_cache.py``), and makes the initial model. For a resumed run it reads the stored
configuration and preparation. It starts the training monitor (``monitor.py``), an actor that collects metrics, unreadable pairs
and errors. Then it builds Ray's `TorchTrainer` and passes it to the supervisor (``supervisor.py``), which runs it in a thread
while the main thread polls the monitor, shows progress and handles Ctrl-C.

**Readers** (``ray_data.py``). Tasks of Ray Data read shards, decode images, tokenize texts, and distribute the batches to the
workers in the order of the steps. The order depends only on the seed and the step, not on the number of workers.

**Workers** (``worker.py``). Each runs the training loop of ``vilseg.training`` on its slice of every batch. Torch's DDP or FSDP
averages the gradients. If several machines train without GPUs, ``process_group.py`` selects the network interface. Rank 0
reports metrics to the monitor and the metrics file, and writes checkpoints and the model (``reporting.py``).

**Checkpoints** (``vilseg.training.checkpoints``) are written to the run directory by a thread of rank 0 while training continues.
The manifest is written last, and a checkpoint without a manifest is ignored, so every restart finds a complete checkpoint.

Failures:

- *A worker dies.* Ray Train stops the others and starts all again, at most ``trainer.max_failures`` times (``train_job.py``).
  Readers and workers both start from the last checkpoint, so the losses equal those of an uninterrupted run.
- *A machine is lost, or one is added.* With a fixed ``trainer.workers``, a lost machine is handled like a dead worker. With a
  range, every trainer starts with the largest number of workers that fits: ``elastic.py`` waits for free resources, and stops a
  run with a checkpoint when more workers would fit.
- *The driver dies.* Its actors and workers end with it. ``vilseg train --resume`` continues from the last checkpoint. The first
  Ctrl-C or SIGTERM stops the run with a checkpoint; the second one stops it at once (``supervisor.py``).
- *The object store does not answer.* Reads and writes are retried (``vilseg.storage``). While a checkpoint waits for the store,
  training continues until the next checkpoint is due.
- *Pairs cannot be read.* The monitor counts them, and ends the run when they exceed ``data.max_bad_share``; their keys are
  written to ``quarantine.jsonl`` (``supervisor.py``).
- *The input or the configuration is wrong, or the loss is not finite.* A restart would not help. The worker passes the error to
  the monitor, restarted workers return at once, and the supervisor raises the error on the driver.
"""
