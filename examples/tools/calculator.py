"""Two tools. The model reads their names, type hints and docstrings."""


def multiply(a: float, b: float) -> float:
    """The product of two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a * b


def add(a: float, b: float) -> float:
    """The sum of two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b
