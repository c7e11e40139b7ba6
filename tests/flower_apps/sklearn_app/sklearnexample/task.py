"""Model and data of the scikit-learn app."""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

CLASSES = np.array([0, 1])
NUM_FEATURES = 30


def create_model(iterations: int, fit_intercept: bool) -> LogisticRegression:
    """Create a model that goes on from the parameters it has, and set those to zero."""
    model = LogisticRegression(max_iter=iterations, fit_intercept=fit_intercept, warm_start=True)
    model.classes_ = CLASSES
    model.coef_ = np.zeros((1, NUM_FEATURES))
    model.intercept_ = np.zeros(1)
    return model


def get_model_params(model: LogisticRegression) -> list[np.ndarray]:
    """Return the parameters of the model as a list of arrays."""
    return [model.coef_, model.intercept_] if model.fit_intercept else [model.coef_]


def set_model_params(model: LogisticRegression, params: list[np.ndarray]) -> LogisticRegression:
    """Set the parameters of the model."""
    model.coef_ = params[0]
    if model.fit_intercept:
        model.intercept_ = params[1]
    return model


def load_all():
    """Load the data, each feature scaled to mean 0 and deviation 1."""
    inputs, labels = load_breast_cancer(return_X_y=True)
    return (inputs - inputs.mean(0)) / inputs.std(0), labels


def load_data(partition_id: int, num_partitions: int):
    """Load one partition, split into training and test part."""
    inputs, labels = load_all()
    mine = slice(partition_id, None, num_partitions)
    return train_test_split(inputs[mine], labels[mine], test_size=0.2, random_state=7, stratify=labels[mine])
