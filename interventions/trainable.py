"""A whole intervention while it is trained: family modules at layers and positions, lowered when it is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from reftserve.interventions.edit import PlacedEdit
from reftserve.interventions.families import FAMILIES, Family
from reftserve.interventions.positions import Positions


@dataclass(frozen=True)
class InterventionConfig:
    """What an intervention is made of. tied: prefix and suffix positions share their weights."""

    family: str
    layers: tuple[int, ...]
    positions: str
    rank: int
    tied: bool = True
    dropout: float = 0.0


class TrainableIntervention(nn.Module):
    """Family modules in a fixed order: by layer, prefix before suffix where they are untied.

    Raises ValueError for an unknown family, PositionsError for positions.
    """

    def __init__(self, config: InterventionConfig, hidden_size: int, *, seed: int = 0) -> None:
        super().__init__()
        if config.family not in FAMILIES:
            raise ValueError(f"family {config.family!r}; known are {', '.join(FAMILIES)}")
        self.config = config
        positions = Positions.parse(config.positions)
        parts = [positions] if config.tied else positions.split()
        self.sites = [(layer, part) for layer in config.layers for part in parts]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.families = nn.ModuleList(
                FAMILIES[config.family](hidden_size, config.rank, dropout=config.dropout) for _ in self.sites
            )

    @property
    def num_parameters(self) -> int:
        """Numbers that training changes."""
        return sum(parameter.numel() for parameter in self.parameters())

    def placed(self) -> Sequence[tuple[int, Positions, Family]]:
        """The modules with their layers and positions."""
        return [
            (layer, positions, family)
            for (layer, positions), family in zip(self.sites, self.families, strict=True)
            if isinstance(family, Family)
        ]

    def lower(self) -> tuple[PlacedEdit, ...]:
        """The canonical edits with the same effect as the modules in evaluation mode."""
        return tuple(PlacedEdit(layer, positions, family.lower()) for layer, positions, family in self.placed())
