"""Calibration: what the layers of a model see and how steep its loss is, on named data.

Three statistics, for what is fitted to data: the mean input of a layer (`acts`), the second moment
of its inputs (`gram`) and the mean of squared gradients (`fisher`). `collecting` takes them from a
live module, a few layers a pass so that memory stays bounded; `providing` hands them to edits and
merges, which ask by name (`deltalab.apply.extras.NEEDS`), and keeps them in the store of artefacts.
"""
