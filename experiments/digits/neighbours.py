"""Print what nearest neighbours reach on the digits' own split: `python experiments/digits/neighbours.py`."""

from sklearn.neighbors import KNeighborsClassifier

from pdvit.config.schema import DataConfig
from pdvit.data.opening import open_source

splits = open_source(DataConfig()).splits
flat = {name: (split.images[:, 0].flatten(1).numpy(), split.labels.numpy()) for name, split in splits.items()}
accuracy = KNeighborsClassifier(3).fit(*flat["train"]).score(*flat["test"])
print(f"3 nearest neighbours: test accuracy {accuracy:.1%}")
