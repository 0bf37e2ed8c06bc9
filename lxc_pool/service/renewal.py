"""What a new configuration, or a new version of an image, means for the containers that there are.

Leases go on. Warm containers that are not what would be made now are outdated: they stay until their replacements have
come up, a few at a time, so that there is always one to be had. Reaped at once are those of a profile that is no more,
and those that were made for other people than may have them now.
"""

from __future__ import annotations

import logging

from lxc_pool.config import Config, ProfileConfig
from lxc_pool.images.store import Image
from lxc_pool.service.handoff import Handoff
from lxc_pool.service.lifecycle import Reason
from lxc_pool.service.reaper import Reaper
from lxc_pool.service.shelf import Shelf
from lxc_pool.service.sizing import Sizing
from lxc_pool.service.stock import Stock

log = logging.getLogger(__name__)


class Renewal:
    """Brings the shelves up to date; everything with the stock's lock held."""

    def __init__(self, stock: Stock, reaper: Reaper, handoff: Handoff, sizing: Sizing) -> None:
        self._stock = stock
        self._reaper = reaper
        self._handoff = handoff
        self._sizing = sizing

    def reconfigure(self, config: Config) -> None:
        """Let the profiles be those of *config*."""
        before = {name: shelf.profile for name, shelf in self._stock.shelves.items() if not shelf.retired}
        self._stock.arrange(config.profiles)
        for profile in config.profiles:
            if profile.name not in before:
                log.info("profile %r is new", profile.name)
            self._change(self._stock.shelves[profile.name], profile)
        for shelf in list(self._stock.shelves.values()):
            if shelf.retired:
                self._retire(shelf)
        self._sizing.reconfigure(config, before)
        self._stock.forget_retired()
        self.look_for_images()

    def look_for_images(self) -> None:
        """Have a lane look whether there are newer versions of the images."""
        for shelf in self._stock.shelves.values():
            shelf.look_again = shelf.image is not None
            shelf.changed_images.clear()
        self._stock.wake()

    def image_ready(self, shelf: Shelf, image: Image) -> None:
        """Let new containers be cloned from *image*."""
        if shelf.image is not None and shelf.image.ref == image.ref:
            return
        shelf.image = image
        log.info("image %s is ready for profile %r", image.ref, shelf.profile.name)
        self._sort_out(shelf)

    def image_refused(self, image: Image) -> None:
        """Hand out no container of *image* any more: it is not what was made. Leases go on."""
        for shelf in self._stock.shelves.values():
            shelf.changed_images.add(image.ref)
            for member in shelf.barred():
                self._reaper.reap(member, Reason.IMAGE_CHANGED)

    def _change(self, shelf: Shelf, profile: ProfileConfig) -> None:
        shelf.change(profile)
        for member in shelf.barred():
            self._reaper.reap(member, Reason.IMAGE_REPLACED)
        self._sort_out(shelf)

    def _sort_out(self, shelf: Shelf) -> None:
        if outdated := shelf.sort_out():
            log.info(
                "%d warm containers of profile %r are outdated; they are replaced, a few at a time",
                outdated,
                shelf.profile.name,
            )

    def _retire(self, shelf: Shelf) -> None:
        name = shelf.profile.name
        self._handoff.turn_away(shelf, ValueError(f"profile {name!r} is no more: the configuration has changed"))
        while shelf.has_warm:
            self._reaper.reap(shelf.spare(), Reason.PROFILE_REMOVED)
