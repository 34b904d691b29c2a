"""
Pack demonstrations of your own robot: `python course/your_robot.py [DIR]`, default data/my-robot.

As it is, it packs six made-up demonstrations, so that you can try the rest of the way at once:

    python -m nanogr.clips data/my-robot                 # what it holds, every byte checked
    python train.py --data data/my-robot --init none --steps 1 --out out/my-robot

Replace `demonstrations` by your own recordings. A clip is one sentence done once, from the moment at which it
was given; a long recording with several sentences becomes several clips with the same `episode`, so that none
of them is held out while its neighbours are trained on. Full contract: nanogr/clips.py.
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from nanogr import clips

HZ = 30.0                                                # steps a second; [OBS] looks 3 steps ahead
METRES, RADIANS = 1 / 50, 1 / 20                         # moved in a step by an action of 1: CALVIN's scales


def demonstrations():
    """Yield sentence, task, both cameras' frames, poses (L, 6), gripper widths and commands (L,)."""
    rng = np.random.default_rng(0)
    for number in range(6):
        poses = np.cumsum(rng.uniform(-0.01, 0.01, (20, 6)), 0)       # x y z in METRES, not millimetres;
        #                                                               Euler x y z in RADIANS, not degrees
        width = np.full(20, 0.08)                                     # metres between the fingers: index 6
        command = np.where(np.arange(20) < 10, 1, -1)                 # index 14: what it was TOLD, +1 open,
        #                                                               -1 close; not its width, not 0 and 1
        static = rng.integers(0, 256, (20, 200, 200, 3), np.uint8)    # RGB, not OpenCV's BGR
        wrist = rng.integers(0, 256, (20, 84, 84, 3), np.uint8)       # any sizes, but the same in all clips
        yield "pick up the cup", "pick_cup", static, wrist, poses, width, command


def pack(directory):
    # The names are those of GR1Config.cameras. A third camera is one more name here and in train.py's
    # --model 'cameras={"rgb_static": 224, "rgb_gripper": 224, "rgb_side": 224}'; model.py stays as it is.
    with clips.ShardWriter(directory, 0, ["rgb_static", "rgb_gripper"]) as shard:
        for episode, (sentence, task, static, wrist, poses, width, command) in enumerate(demonstrations()):
            robot_obs = np.zeros((len(poses), clips.OBS_DIM), np.float32)         # read are 0-5 and 14
            robot_obs[:, :6], robot_obs[:, 6], robot_obs[:, 14] = poses, width, command
            # Seven numbers of an action: the move to the next pose, scaled to -1..1, the gripper's command.
            # Angles jump by 2 pi: the shorter way is what the arm turned. The last step has no action.
            turn = (np.diff(poses[:, 3:], axis=0) + np.pi) % (2 * np.pi) - np.pi
            actions = np.full((len(poses), clips.ACTION_DIM), np.nan, np.float32)
            actions[:-1, :3] = np.clip(np.diff(poses[:, :3], axis=0) / METRES, -1, 1)
            actions[:-1, 3:6] = np.clip(turn / RADIANS, -1, 1)
            actions[:-1, 6] = command[1:]
            # An eighth number (a base, say) goes before the gripper's, which stays last: ACTION_DIM = 8 in
            # nanogr/clips.py, and nn.Linear(half, 7) for the arm in ActionHead (model.py).
            frames = {"rgb_static": static, "rgb_gripper": wrist}
            shard.add(frames, sentence, task, episode, robot_obs, actions)
    clips.write_meta(directory, source="my robot", fps=HZ, command="python course/your_robot.py")


if __name__ == "__main__":
    OUT = sys.argv[1] if len(sys.argv) > 1 else "data/my-robot"
    pack(OUT)
    print(f"wrote {OUT}; python -m nanogr.clips {OUT} says what it holds")
