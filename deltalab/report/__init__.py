"""Records to tables, figures and pages; nothing here imports torch.

`reading` makes `outcomes` of records, `tables`, `summary`, `comparison`, `figures` and `page` show
them, and `command` is `deltalab-report`.
"""
