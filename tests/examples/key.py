"""A configuration key that comes later: a field of its section in harness/spec/config.py, with a default."""

from pydantic.fields import FieldInfo

NAME = "cp"
FIELD = FieldInfo(annotation=int, default=1, description="Ranks that share a sequence.")
