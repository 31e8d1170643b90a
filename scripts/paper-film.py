"""Draws the film of `make paper`: faces as a cascade sees them, wandering over noise. Usage: paper-film.py FILE.

Every frame has new noise, so that the film does not compress further and is as large as the paper's (about 50 MB).
"""

import sys

import cv2
import numpy

WIDTH, HEIGHT, FRAMES, RATE = 640, 480, 480, 15


def face(size):
    """A face in grey: what a Haar cascade looks for is dark eyes and a mouth on a bright oval."""
    picture = numpy.zeros((size, size), numpy.uint8)
    unit = size / 100
    at = lambda x, y: (int(x * unit), int(y * unit))
    cv2.ellipse(picture, at(50, 50), at(38, 48), 0, 0, 360, 205, -1)
    for x in (33, 67):
        cv2.ellipse(picture, at(x, 32), at(12, 3), 0, 0, 360, 60, -1)
        cv2.ellipse(picture, at(x, 41), at(9, 5), 0, 0, 360, 235, -1)
        cv2.circle(picture, at(x, 41), int(5 * unit), 30, -1)
    cv2.line(picture, at(50, 40), at(50, 62), 165, max(1, int(4 * unit)))
    cv2.ellipse(picture, at(50, 64), at(9, 4), 0, 0, 360, 140, -1)
    cv2.ellipse(picture, at(50, 79), at(17, 5), 0, 0, 360, 80, -1)
    return cv2.GaussianBlur(picture, (0, 0), 1.5 * unit)


def main():
    random = numpy.random.default_rng(1)
    film = cv2.VideoWriter(sys.argv[1], cv2.VideoWriter_fourcc(*"MJPG"), RATE, (WIDTH, HEIGHT))
    faces = [face(size) for size in (110, 150, 190)]
    for number in range(FRAMES):
        frame = random.integers(70, 130, (HEIGHT, WIDTH), numpy.uint8)
        for which, picture in enumerate(faces):
            size = len(picture)
            x = int((WIDTH - size) * (0.5 + 0.5 * numpy.sin(number / (40 + 9 * which) + which * 2)))
            y = int((HEIGHT - size) * (0.5 + 0.5 * numpy.cos(number / (55 + 7 * which) + which)))
            place = frame[y : y + size, x : x + size]
            numpy.copyto(place, picture, where=picture > 20)
        film.write(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
    film.release()


main()
