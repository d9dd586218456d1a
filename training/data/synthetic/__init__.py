"""Renders painted solids in rooms, several views of each, with exact masks.

It stands in for the video and multi-view sets of the paper's table 1, and draws the pictures in examples/.
Everything follows from a seed: the same number gives the same object, scene and picture.
"""

from training.data.synthetic.bodies import Pose
from training.data.synthetic.objects import ObjectSpec, make_object
from training.data.synthetic.rendering import render, render_all, render_background, render_cutout
from training.data.synthetic.scenes import Light, Scene, make_light, make_scene

__all__ = [
    "Light",
    "ObjectSpec",
    "Pose",
    "Scene",
    "make_light",
    "make_object",
    "make_scene",
    "render",
    "render_all",
    "render_background",
    "render_cutout",
]
