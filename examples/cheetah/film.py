"""The cheetah itself, drawn by MuJoCo as policies run it: a strip of moments and a GIF. mujoco is imported where it
draws and not before: the charts need none, and `import mujoco` itself fails where $MUJOCO_GL names a library that is
not there."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib
import numpy
from PIL import Image, ImageDraw, ImageFont

from examples.cheetah.charts import COLOURS, INK, LIMIT
from registry.core.errors import InvalidInput, RegistryError

CONTROL_SECONDS = 0.05
FILM_STEPS, GAIT_STEPS = 60, 100  # 3 s and 5 s
FLOOR = ((210, 210, 210), (246, 246, 246))  # its squares are 1 m
SKY = (255, 255, 255)


class PicturesUnavailable(RegistryError):
    """MuJoCo cannot draw here."""


@dataclass(frozen=True)
class Run:
    """Of one policy in one environment.

    Attributes:
        what: `base` or `lora`.
        label: its name in the picture.
        qpos: (steps + 1, nq), from the start on.
    """

    what: str
    label: str
    qpos: Any

    def way(self, step: int) -> float:
        """Metres run until then."""
        return float(self.qpos[step, 0] - self.qpos[0, 0])


def record(policy: Any, what: str, label: str, world: str, *, steps: int = GAIT_STEPS, seed: int = 0) -> Run:
    """A run of a DiffusionPolicy; the same seed gives the same start."""
    from examples.cheetah.simulation import CheetahSimulation
    from examples.cheetah.task import TASK
    from pdp.rollout import roll_out

    simulation = CheetahSimulation([world])
    seen: list[Any] = []

    def watch(_step: int) -> None:
        seen.append(simulation.batch.qpos[0].copy())

    roll_out(policy, simulation, steps=steps, execute=min(TASK.execute, policy.T_action), seed=seed, watch=watch)
    return Run(what, label, numpy.stack([*seen, simulation.batch.qpos[0].copy()]))


class Stage:
    """Draws cheetahs in one world, with a camera that goes along, and turned where there is a slope. Its OpenGL context
    is made here and does not depend on how mujoco was imported before: $MUJOCO_GL is the user's choice, and without it
    EGL, which needs no display.

    Raises:
        PicturesUnavailable: no context can be had.
    """

    def __init__(self, world: str, width: int, height: int) -> None:
        chosen = os.environ.get("MUJOCO_GL", "").strip()
        self._context: Any = None
        try:
            import mujoco

            from examples.cheetah import worlds

            self._slope = worlds.WORLDS[world].slope
            self._model = worlds.world_model(worlds.WORLDS[world])
            self._model.vis.global_.offwidth, self._model.vis.global_.offheight = width, height
            self._paint()
            if chosen or sys.platform != "linux":
                self._gl = mujoco.GLContext(width, height)
            else:
                from mujoco.egl import GLContext

                self._gl = GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_150)
        except Exception as error:
            # Of many kinds: ImportError without a device, AttributeError without libEGL (PyOpenGL looks a function up
            # in None), RuntimeError of a wrong $MUJOCO_GL, mujoco.FatalError, EGL's own.
            how = f"MUJOCO_GL={chosen}" if chosen else "EGL, as MUJOCO_GL is not set"
            raise PicturesUnavailable(
                f"MuJoCo cannot draw with {how}: {type(error).__name__}: {' '.join(str(error).split())[:160]}; install "
                "libegl1 and libgl1-mesa-dri, or install libosmesa6 and set MUJOCO_GL=osmesa"
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._mujoco = mujoco
        self._data = mujoco.MjData(self._model)
        self._scene = mujoco.MjvScene(self._model, 200)
        self._camera = mujoco.MjvCamera()
        self._camera.distance, self._camera.azimuth, self._camera.elevation = 2.35, 90, -10
        self.width, self.height = width, height

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.free()
        self._gl.free()

    def _paint(self) -> None:
        """Calm colours: the model's own floor, black and white with a mirror, hides the legs, and no GIF gets small
        with it."""
        model = self._model
        for texture in range(model.ntex):
            begin, count = model.tex_adr[texture], model.tex_height[texture] * model.tex_width[texture]
            # Of the three only the floor's is a square.
            texels = model.tex_data[begin : begin + 3 * count].reshape(count, 3)
            if model.tex_height[texture] == model.tex_width[texture]:
                dark = texels[:, 0] < 128
                texels[:] = FLOOR[1]
                texels[dark] = FLOOR[0]
            else:
                texels[:] = SKY
        model.mat_reflectance[:], model.mat_specular[:], model.mat_shininess[:] = 0, 0, 0
        model.mat_texrepeat[:] = 40
        # Together not more than 1 on the floor, or its squares would all be white.
        model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = 0.42, 0.4
        model.vis.headlight.specular[:], model.light_specular[:], model.light_diffuse[:] = 0, 0, 0.5
        model.geom_rgba[0] = 1
        # A shadow's map takes most of the time without a graphics card, and one that reaches far makes stains on the
        # floor; this one reaches 1.2 m from the light, which goes along.
        model.vis.quality.shadowsize, model.vis.map.shadowclip = 1024, 1.2 / model.stat.extent
        # Down as in the picture; and straight onto a floor that a turned camera sees, it would make stains too.
        model.light_dir[0] = model.opt.gravity / numpy.linalg.norm(model.opt.gravity)

    def frame(self, run: Run, step: int) -> Image.Image:
        mujoco = self._mujoco
        colour = COLOURS[run.what].lstrip("#")
        self._model.geom_rgba[1:, :3] = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        self._data.qpos[:] = run.qpos[step]
        self._model.light_pos[0] = (run.qpos[step][0], 0, 0) - 3 * self._model.light_dir[0]
        mujoco.mj_forward(self._model, self._data)
        self._camera.lookat[:] = (self._data.qpos[0], 0, 0.5)
        mujoco.mjv_updateScene(
            self._model,
            self._data,
            mujoco.MjvOption(),
            None,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        if self._slope:
            self._turn_camera()
        pixels = numpy.empty((self.height, self.width, 3), dtype=numpy.uint8)
        area = mujoco.MjrRect(0, 0, self.width, self.height)
        self._gl.make_current()
        mujoco.mjr_render(area, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, None, area, self._context)
        return Image.fromarray(numpy.ascontiguousarray(pixels[::-1]))

    def _turn_camera(self) -> None:
        """Around what it looks at, until the gravity, which a world has tilted in place of its ground, points down in
        the picture."""
        sine, cosine = math.sin(self._slope), math.cos(self._slope)
        turn = numpy.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
        middle = self._camera.lookat
        for eye in self._scene.camera:
            eye.pos[:] = middle + turn @ (eye.pos - middle)
            eye.forward[:], eye.up[:] = turn @ eye.forward, turn @ eye.up


def film_strip(stage: Stage, runs: Sequence[Run], *, steps: int = FILM_STEPS, frames: int = 8) -> Image.Image:
    """A row for each run, with the same moments above each other."""
    gap, head, top = 6, 44, 40
    wide = frames * (stage.width + gap) - gap
    strip = Image.new("RGB", (wide, top + len(runs) * (head + stage.height + gap)), "white")
    draw = ImageDraw.Draw(strip)
    moments = [round(step) for step in numpy.linspace(0, steps, frames)]
    for column, step in enumerate(moments):
        middle = column * (stage.width + gap) + stage.width // 2
        draw.text((middle, 4), f"{step * CONTROL_SECONDS:.1f} s", fill=INK, font=_font(28), anchor="ma")
    for row, run in enumerate(runs):
        y = top + row * (head + stage.height + gap)
        draw.text((4, y + 6), run.label, fill=_ink(run.what), font=_font(30, bold=True))
        for column, step in enumerate(moments):
            x = column * (stage.width + gap)
            strip.paste(stage.frame(run, step), (x, y + head))
            place = (x + stage.width - 8, y + head + 6)
            draw.text(place, f"{run.way(step):z.1f} m", fill=INK, font=_font(28), anchor="ra")
    return strip


def gait_frames(stage: Stage, runs: Sequence[Run], *, steps: int = GAIT_STEPS, every: int = 1) -> list[Image.Image]:
    """The runs beside each other, at each control step or at some."""
    gap, head = 4, 26
    frames = []
    for step in range(0, steps + 1, every):
        frame = Image.new("RGB", (len(runs) * (stage.width + gap) - gap, head + stage.height), "white")
        draw = ImageDraw.Draw(frame)
        for column, run in enumerate(runs):
            x = column * (stage.width + gap)
            frame.paste(stage.frame(run, step), (x, head))
            draw.text((x + 4, 4), run.label, fill=_ink(run.what), font=_font(13, bold=True))
            draw.text((x + stage.width - 4, 4), f"{run.way(step):z.1f} m", fill=INK, font=_font(14), anchor="ra")
        frames.append(frame)
    return frames


def write_gif(frames: Sequence[Image.Image], path: Path, seconds: float, *, limit: int = LIMIT) -> Path:
    """Writes them with one palette, and with fewer colours, then fewer frames, until it is below the limit.

    Raises:
        InvalidInput: it does not get that small.
    """
    for every, colours in ((1, 64), (1, 32), (1, 16), (2, 32), (2, 16), (4, 16)):
        kept = frames[::every]
        # A palette of each frame's own would flicker, and so would dither.
        some = kept[:: max(1, len(kept) // 6)]
        sheet = Image.new("RGB", (some[0].width, some[0].height * len(some)))
        for place, frame in enumerate(some):
            sheet.paste(frame, (0, place * frame.height))
        palette = sheet.quantize(colours, dither=Image.Dither.NONE)
        flat = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in kept]
        flat[0].save(path, save_all=True, append_images=flat[1:], duration=round(1000 * seconds * every), loop=0)
        if path.stat().st_size < limit:
            return path
    path.unlink()
    raise InvalidInput(f"{path} does not get below {limit} bytes; take fewer or smaller frames")


@functools.cache
def _font(size: int, bold: bool = False) -> Any:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _ink(what: str) -> str:
    """Text in a colour needs more contrast to white than an area of it."""
    return {"base": "#9A6A00"}.get(what, COLOURS[what])
