"""Images of requests: from a PIL image, a path, bytes or a URL to upright RGB pixels with a digest, within bounds."""

from labkit.images.decode import Image
from labkit.images.limits import FORMATS, ImageError, ImagesBusy, Limits
from labkit.images.read import read_image
from labkit.images.urls import ImageUrls

__all__ = ["FORMATS", "Image", "ImageError", "ImageUrls", "ImagesBusy", "Limits", "read_image"]
