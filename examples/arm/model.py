"""A torque-controlled arm of seven joints with a payload at its tip, and its worlds. A world is a small configuration
with a name: another payload, weaker motors, more damping, less gravity."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import mujoco

JOINTS = 7
FRAME_SKIP = 4  # physics steps of 0.005 s: control at 50 Hz
PAYLOAD = "payload"  # the body; the tip is its middle

ARM = """
<mujoco model="arm">
  <compiler angle="radian"/>
  <option timestep="0.005" integrator="implicitfast" gravity="0 0 -9.81">
    <flag contact="disable"/>
  </option>
  <default>
    <joint type="hinge" damping="1"/>
    <geom type="capsule" size="0.05"/>
    <motor ctrllimited="true" ctrlrange="-1 1"/>
  </default>
  <worldbody>
    <body name="link1" pos="0 0 0.15">
      <joint name="joint1" axis="0 0 1" armature="0.5" damping="4"/>
      <geom fromto="0 0 0 0 0 0.15" mass="3"/>
      <body name="link2" pos="0 0 0.18">
        <joint name="joint2" axis="0 1 0" armature="0.5" damping="5"/>
        <geom fromto="0 0 0 0 0 0.16" mass="3"/>
        <body name="link3" pos="0 0 0.16">
          <joint name="joint3" axis="0 0 1" armature="0.3" damping="2"/>
          <geom fromto="0 0 0 0 0 0.16" mass="2.5"/>
          <body name="link4" pos="0 0 0.16">
            <joint name="joint4" axis="0 1 0" armature="0.3" damping="3"/>
            <geom fromto="0 0 0 0 0 0.2" mass="2.5"/>
            <body name="link5" pos="0 0 0.2">
              <joint name="joint5" axis="0 0 1" armature="0.2"/>
              <geom fromto="0 0 0 0 0 0.18" mass="2"/>
              <body name="link6" pos="0 0 0.18">
                <joint name="joint6" axis="0 1 0" armature="0.2"/>
                <geom fromto="0 0 0 0 0 0.08" mass="1"/>
                <body name="link7" pos="0 0 0.08">
                  <joint name="joint7" axis="0 0 1" armature="0.2"/>
                  <geom fromto="0 0 0 0 0 0.04" size="0.03" mass="0.4"/>
                  <body name="payload" pos="0.04 0 0.06">
                    <geom type="sphere" size="0.04" mass="0.3"/>
                  </body>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="joint1" gear="40"/>
    <motor joint="joint2" gear="100"/>
    <motor joint="joint3" gear="25"/>
    <motor joint="joint4" gear="55"/>
    <motor joint="joint5" gear="10"/>
    <motor joint="joint6" gear="12"/>
    <motor joint="joint7" gear="10"/>
  </actuator>
</mujoco>
"""
"""A motor's gear is the torque in N m of the control 1, the largest that it takes."""


@dataclass(frozen=True)
class World:
    """What the arm is like.

    Attributes:
        payload: mass at the tip, kg.
        gear: factor of all motors' torques.
        damping: factor of all joints' damping.
        gravity: factor of the gravity.
    """

    payload: float = 0.3
    gear: float = 1.0
    damping: float = 1.0
    gravity: float = 1.0

    def to_json(self) -> dict[str, float]:
        return asdict(self)


ORIGINAL = "original"
WORLDS = {
    ORIGINAL: World(),
    "payload": World(payload=2.5),
    "gear": World(gear=0.7),
    "damping": World(damping=6.0),
    "gravity": World(gravity=0.3),
}


def world_model(world: World) -> Any:
    """The MjModel of a world."""
    model = mujoco.MjModel.from_xml_string(ARM)
    body = model.body(PAYLOAD).id
    # A sphere of the same size: its inertia grows as its mass does.
    model.body_inertia[body] *= world.payload / model.body_mass[body]
    model.body_mass[body] = world.payload
    model.actuator_gear[:, 0] *= world.gear
    model.dof_damping[:] *= world.damping
    model.opt.gravity[:] *= world.gravity
    mujoco.mj_setConst(model, mujoco.MjData(model))
    return model
