"""The application of the workers: ``forebay run --app faults.delivery.app:node``."""

from __future__ import annotations

from faults.delivery.application import Application
from faults.delivery.plants import plant
from faults.delivery.setting import DeliverySetup

_setup = DeliverySetup.from_environ()
plant(_setup.planted)
node = Application(_setup).node
