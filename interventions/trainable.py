"""An intervention in training: family modules at layers and positions. Publishing lowers them to edits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from reftserve.interventions.config import InterventionConfig
from reftserve.interventions.edit import PlacedEdit
from reftserve.interventions.families import FAMILIES, Family
from reftserve.interventions.positions import Positions


class TrainableIntervention(nn.Module):
    """Family modules by layer, untied prefixes first. Raises ValueError for an unknown family, PositionsError."""

    def __init__(self, config: InterventionConfig, hidden_size: int, *, seed: int = 0) -> None:
        super().__init__()
        if config.family not in FAMILIES:
            raise ValueError(f"family {config.family!r}; expected one of {', '.join(FAMILIES)}")
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
        """Return the number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def placed(self) -> Sequence[tuple[int, Positions, Family]]:
        """Return the modules with their layers and positions."""
        return [
            (layer, positions, family)
            for (layer, positions), family in zip(self.sites, self.families, strict=True)
            if isinstance(family, Family)
        ]

    def lower(self) -> tuple[PlacedEdit, ...]:
        """Return the canonical edits with the effect of the modules in evaluation mode."""
        return tuple(PlacedEdit(layer, positions, family.lower()) for layer, positions, family in self.placed())
