"""Training jobs, from the API's request to a published intervention.

job_service.py     create, list, pause, cancel       recipe.py, candidates.py   open settings -> plan.py
worker.py          the process that takes jobs       job_runner.py     one job: begin, advance, publish
preparation.py     files -> examples, report, plan   job_data.py       its durable result (encoded_file.py)
data_check.py      a preparation within limits       data_check_process.py   its process
sweep.py           trials side by side               trainer.py        one trial's optimizer steps
choice.py          which trial is published          scores.py         losses and accuracies of completions
activation_cache.py  what no step changes            spans.py          which tokens a pass computes
varlen.py          the forward pass, unpadded        varlen_attention.py   its attention
job_repository.py  rows of jobs, under their lease   job_files.py      encoded data and checkpoints (checksums.py)
progress.py        steps as events, in batches       event_feed.py     events for those who watch
threads.py         politeness on a busy CPU
pace.py            time that is left                 training_kernels.py   attention to kept prefixes by our kernel
"""
