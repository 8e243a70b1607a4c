"""A child that does its work, and has something to say of it."""

from harness.workers.fake_child import Child

Child().write(message="the loss was not finite from step 2 of 5 on")
