"""The losses again, in NumPy float64 and loops: `(student rows, teacher rows, weights) -> float`.

Rows that do not count are left out before.
"""

import itertools
import math

import numpy as np

LABELS = np.array([0, 2, 5, 1, 3])
SCALE = np.array([0.5, -1.0, 2.0, 0.0, 1.0, -3.0])


def softmax(z):
    e = np.exp(z - np.max(z))
    return e / e.sum()


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def weighted(values, weights):
    return sum(w * v for v, w in zip(values, weights, strict=True)) / sum(weights)


def by_row(f):
    """An oracle of a loss that is a mean over rows of `f(student, teacher, label)`."""

    def oracle(s, t, weights, labels):
        return weighted([f(*row) for row in zip(s, t, labels, strict=True)], weights)

    return oracle


def kd(temperature, kind):
    def one(s, t, label):
        p, q = softmax(t / temperature), softmax(s / temperature)
        m = (p + q) / 2
        return (
            temperature**2
            * {
                "forward": divergence(p, q),
                "reverse": divergence(q, p),
                "js": (divergence(p, m) + divergence(q, m)) / 2,
            }[kind]
        )

    return by_row(one)


@by_row
def logit_mse(s, t, label):
    return np.mean((s - t) ** 2)


@by_row
def centred_mse(s, t, label):
    return np.mean((s - t - np.mean(s - t)) ** 2)


@by_row
def decoupled(s, t, label):
    p, q = softmax(t / 2), softmax(s / 2)
    rest = np.arange(len(s)) != label
    label_term = divergence([p[label], p[rest].sum()], [q[label], q[rest].sum()])
    rest_term = divergence(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
    return 4 * (0.5 * label_term + 3 * rest_term)


def correlation(a, b, weights):
    a, b = a - weighted(a, weights), b - weighted(b, weights)
    return weighted(a * b, weights) / math.sqrt(weighted(a * a, weights) * weighted(b * b, weights))


def dist(s, t, weights, labels):
    p, q = [np.array([softmax(row / 2) for row in z]) for z in (t, s)]
    ones = np.ones(s.shape[1])
    rows = [1 - correlation(a, b, ones) for a, b in zip(q, p, strict=True)]
    columns = [1 - correlation(a, b, weights) for a, b in zip(q.T, p.T, strict=True)]
    return 4 * (0.5 * weighted(rows, weights) + 2 * np.mean(columns))


@by_row
def cross_entropy(s, t, label):
    return -np.sum((0.8 * t + 0.2 / len(s)) * np.log(softmax(s)))


def attention(s, t, weights, labels):
    values = []
    for a, b in zip(s, t, strict=True):
        maps = []
        for x in (a, b):
            place = np.array([np.mean(np.abs(c) ** 3) for c in x.reshape(3, 2)])
            maps.append(place / math.sqrt(np.sum(place**2)))
        values.append(np.mean((maps[0] - maps[1]) ** 2))
    return weighted(values, weights)


@by_row
def factor_transfer(s, t, label):
    return np.mean(np.abs(s / np.linalg.norm(s) - t / np.linalg.norm(t)))


@by_row
def variational(s, t, label):
    variance = [math.log(1 + math.exp(a)) + 1e-5 for a in SCALE]
    terms = [(b - a) ** 2 / v + math.log(v) for a, b, v in zip(s, t, variance, strict=True)]
    return sum(terms) / 2 / len(terms)


def reconstruction(s, t, weights, labels):
    parts = []
    for columns in (slice(0, 2), slice(2, 6)):
        error = weighted(np.sum((s - t)[:, columns] ** 2, axis=1), weights)
        parts.append(error / weighted(np.sum(t[:, columns] ** 2, axis=1), weights))
    return np.mean(parts)


def similarity(s, t, weights, labels):
    grams = []
    for x in (s, t[:, :4]):
        gram = np.array([[np.dot(a, b) for b in x] for a in x])
        grams.append([row / np.linalg.norm(row) for row in gram])
    return np.sum((np.array(grams[0]) - grams[1]) ** 2) / len(s) ** 2


def huber(a):
    return a * a / 2 if abs(a) < 1 else abs(a) - 0.5


def relational_distance(s, t, weights, labels):
    pairs = list(itertools.permutations(range(len(s)), 2))
    found = []
    for x in (s, t[:, :4]):
        d = [math.dist(x[i], x[j]) for i, j in pairs]
        found.append(np.array(d) / np.mean(d))
    return np.mean([huber(a) for a in found[0] - found[1]])


def relational_angle(s, t, weights, labels):
    values = []
    for i, j, k in itertools.permutations(range(len(s)), 3):
        cosines = []
        for x in (s, t[:, :4]):
            a, b = x[i] - x[j], x[k] - x[j]
            cosines.append(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
        values.append(huber(cosines[0] - cosines[1]))
    return np.mean(values)


def pkt(s, t, weights, labels):
    total = 0
    for i in range(len(s)):
        chances = []
        for x in (s, t[:, :4]):
            near = [
                (np.dot(x[i], y) / np.linalg.norm(x[i]) / np.linalg.norm(y) + 1) / 2 + 1e-7
                for j, y in enumerate(x)
                if j != i
            ]
            chances.append(np.array(near) / sum(near))
        total += divergence(chances[1], chances[0])
    return total / len(s)
