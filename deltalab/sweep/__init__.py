"""Many points: in other processes, on clusters, stopped, continued and told of.

`composing` checks their configs, `jobs` those of commands that write checkpoints; `launching`,
`clusters` and `gpus` run them, `stopping` ends them between two points, `sweeps` is what a sweep
leaves, `status` is `deltalab-status`, `closing` tells a tracker when all is done.
"""
