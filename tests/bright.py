"""A reward for any picture, by name: how bright it is."""


def bright(samples):
    return [{"bright": float(s.image.mean() / 255)} for s in samples]
