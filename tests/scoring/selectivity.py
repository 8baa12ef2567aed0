"""An analysis that is no part of the package: word for word the example that `FeatureAnalysis` gives."""

import torch

import fluxsae


class Selectivity(fluxsae.FeatureAnalysis):
    columns = (fluxsae.Column("selectivity", "float", "1 - mean(S)² / mean(S²) over images"),)

    def begin(self, module, shards):
        self.n_images = len(shards.with_tokens)
        self.sums = torch.zeros(2, module.sae.n_features, dtype=torch.float64, device=module.device)

    def update(self, batch):
        scores = batch.scores.double()
        self.sums += torch.stack([scores.sum(dim=0), scores.square().sum(dim=0)])

    def finish(self, trainer):
        mean, square = trainer.strategy.reduce(self.sums, reduce_op="sum") / self.n_images
        return {"selectivity": (1 - mean.square() / square).tolist()}
