"""Model and data of the NumPy app: a linear regression."""

import numpy as np

TRUE_WEIGHTS = np.array([1.5, -2.0, 0.5, 3.0])


def get_model() -> list[np.ndarray]:
    """Return the initial weights and the bias, a number without dimensions."""
    return [np.zeros(4), np.array(0.0)]


def load_data(partition_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Generate a partition; the partitions differ in size and in centre."""
    rng = np.random.default_rng(partition_id)
    inputs = rng.normal(0.1 * partition_id, 1.0, (40 + 10 * partition_id, 4))
    return inputs, inputs @ TRUE_WEIGHTS + 0.7 + rng.normal(0.0, 0.1, len(inputs))


def train(model: list[np.ndarray], inputs: np.ndarray, targets: np.ndarray, lr: float) -> list[np.ndarray]:
    """Take ten steps of gradient descent."""
    weights, bias = model
    for _ in range(10):
        error = inputs @ weights + bias - targets
        weights, bias = weights - lr * inputs.T @ error / len(error), bias - lr * error.mean()
    return [weights, np.asarray(bias)]


def mean_squared_error(model: list[np.ndarray], inputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean squared error."""
    weights, bias = model
    return float(np.mean((inputs @ weights + bias - targets) ** 2))
