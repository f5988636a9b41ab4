"""What an edit leaves of a fine-tune, in files that go with its base.

`packs` writes codes and puts them onto the base again, `adapters` writes what is of low rank for
PEFT, `patches` the changed entries alone.
"""
