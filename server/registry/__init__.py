"""The durable store of published interventions."""
