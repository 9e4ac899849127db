"""The families, one file each: trainable modules that lower to edits. A new family adds a file and a line here."""

from reftserve.interventions.families.base import Family
from reftserve.interventions.families.consreft import ConsReFT
from reftserve.interventions.families.direft import DiReFT
from reftserve.interventions.families.lobireft import LobiReFT
from reftserve.interventions.families.loreft import LoReFT
from reftserve.interventions.families.nodireft import NodiReFT
from reftserve.interventions.families.noreft import NoReFT

FAMILIES: dict[str, type[Family]] = {
    "loreft": LoReFT,
    "noreft": NoReFT,
    "direft": DiReFT,
    "consreft": ConsReFT,
    "lobireft": LobiReFT,
    "nodireft": NodiReFT,
}

__all__ = ["FAMILIES", "ConsReFT", "DiReFT", "Family", "LoReFT", "LobiReFT", "NoReFT", "NodiReFT"]
