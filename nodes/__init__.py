"""What the graph editor sees: one V3 node a file."""

from .health import ZImageTurboHealth
from .loader import ZImageTurboLoader
from .sampler import ZImageTurboSampler
from .save import ZImageTurboSaveImage
from .sigmas import ZImageTurboSigmas
from .text_encoder import ZImageTurboTextEncode

NODES = [
    ZImageTurboLoader,
    ZImageTurboTextEncode,
    ZImageTurboSampler,
    ZImageTurboSaveImage,
    ZImageTurboSigmas,
    ZImageTurboHealth,
]
