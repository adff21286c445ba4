import jax
import numpy as np
import pytest

from xprompt_jax.data import world
from xprompt_jax.data.render import CLASSES, COLORS, MATERIALS, MAX_DEPTH, SHAPES
from xprompt_jax.errors import UserError

SIZE = 33  # odd, so that a pixel centre lies on the camera axis


@pytest.fixture(scope="module")
def scenes():
    batch = jax.device_get(world.sample_scenes(jax.random.key(0), 8))
    return [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(8)]


def _one_object(scene, shape, *, pitch=0.0, height=1.0, size=1.0, z=5.0, yaw=0.5):
    scene = world.replace_values(scene, None, exists=False, camera=(height, pitch, 1.5))
    return world.replace_values(scene, 0, exists=True, shape=SHAPES.index(shape), size=size, position=(0, z), yaw=yaw)


def _picture(scene):
    return jax.device_get(world.render(scene, SIZE))


def _coordinates():
    at = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    return np.meshgrid(at / 1.5, -at / 1.5)  # across and up, per metre of depth


def test_sphere_by_hand(scenes):
    r = _picture(_one_object(scenes[0], "sphere"))
    u, v = _coordinates()
    # Radius 1 at (0, 1, 5), eye at (0, 1, 0): |t (u, v, 1) - (0, 0, 5)| = 1.
    a, b = u**2 + v**2 + 1, 5.0
    root = b * b - a * 24
    hit = root > 0
    t = (b - np.sqrt(np.where(hit, root, 0))) / a
    np.testing.assert_array_equal(r.instances == 1, hit)
    np.testing.assert_allclose(r.depth[hit], t[hit], rtol=1e-5)
    assert r.depth[SIZE // 2, SIZE // 2] == pytest.approx(4.0, abs=1e-5)
    normal = np.stack([t * u, t * v, 5 - t], -1)  # z towards the viewer
    np.testing.assert_allclose(r.normals[hit], normal[hit], atol=1e-3)
    assert np.all(r.segmentation[hit] == CLASSES.index("sphere"))


def test_floor_and_sky_by_hand(scenes):
    pitch, height = 0.3, 2.0
    empty = world.replace_values(scenes[0], None, exists=False, camera=(height, pitch, 1.5))
    r = _picture(empty)
    _, v = _coordinates()
    drop = np.sin(pitch) - v * np.cos(pitch)  # metres down per metre of planar depth
    floor = drop > 1e-6
    np.testing.assert_array_equal(r.segmentation, np.where(floor, 1, 0))
    depth = np.where(floor, np.minimum(height / np.where(floor, drop, 1), MAX_DEPTH), MAX_DEPTH)
    np.testing.assert_allclose(r.depth, depth, rtol=1e-4)
    np.testing.assert_allclose(r.normals[floor], np.broadcast_to([0, np.cos(pitch), np.sin(pitch)], (floor.sum(), 3)), atol=1e-6)
    np.testing.assert_allclose(r.normals[~floor], np.broadcast_to([0.0, 0, 1], ((~floor).sum(), 3)))


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_agree_with_depth(scenes, shape):
    """On every solid, the normal is orthogonal to differences of neighbouring surface points (away from its edges)."""
    r = _picture(_one_object(scenes[0], shape, pitch=0.35, height=3.0, z=3.0, yaw=0.7))
    u, v = _coordinates()
    point = r.depth[..., None] * np.stack([u, v, -np.ones_like(u)], -1)
    mine = r.instances == 1
    assert 60 < mine.sum() < SIZE * SIZE / 2
    for step in ((0, 1), (1, 0)):
        here, there = (slice(1, -1),) * 2, tuple(slice(1 + s, SIZE - 1 + s) for s in step)
        back = tuple(slice(1 - s, SIZE - 1 - s) for s in step)
        # Where both neighbours face the same way, the chord between them lies in the tangent plane.
        smooth = mine[here] & mine[there] & mine[back] & ((r.normals[there] * r.normals[back]).sum(-1) > 0.8)
        chord = (point[there] - point[back])[smooth]
        chord /= np.linalg.norm(chord, axis=-1, keepdims=True)
        assert smooth.sum() > 20
        assert np.median(np.abs((chord * r.normals[here][smooth]).sum(-1))) < 0.02


def test_labels_normals_and_depth_are_consistent(scenes):
    for scene in scenes:
        r = _picture(scene)
        assert (r.rgb.dtype, r.depth.dtype, r.segmentation.dtype) == (np.uint8, np.float32, np.int32)
        np.testing.assert_allclose(np.linalg.norm(r.normals, axis=-1), 1, atol=1e-5)
        assert np.all((r.depth > 0) & (r.depth <= MAX_DEPTH))
        np.testing.assert_array_equal(r.instances > 0, r.segmentation >= 2)
        for i in np.unique(r.instances[r.instances > 0]):
            assert scene.exists[i - 1]
            assert np.all(r.segmentation[r.instances == i] == 2 + scene.shape[i - 1])
        assert len({int(c) for c in scene.color[scene.exists]}) == scene.exists.sum()


def test_deterministic_and_batch_independent(scenes):
    again = jax.device_get(world.sample_scenes(jax.random.key(0), 8))
    for a, b in zip(jax.tree.leaves(jax.tree.map(lambda x: x[3], again)), jax.tree.leaves(scenes[3]), strict=True):
        np.testing.assert_array_equal(a, b)
    first, second = _picture(scenes[0]), _picture(scenes[0])
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    stacked = jax.tree.map(lambda *x: np.stack(x), *scenes[:2])
    batch = jax.device_get(world.render_batch(stacked, SIZE))
    assert np.abs(batch.rgb[0].astype(int) - first.rgb).max() <= 1
    np.testing.assert_allclose(batch.depth[0], first.depth, rtol=1e-5)
    assert np.mean(first.rgb != _picture(scenes[1]).rgb) > 0.5


def test_light_and_shadow_never_change_geometry(scenes):
    for direction in ("left", "back"):
        edit = world.change_light(scenes[2], direction, "warm")
        before, after = _picture(scenes[2]), _picture(edit.scene)
        assert np.mean(before.rgb != after.rgb) > 0.1
        for name in ("depth", "normals", "segmentation", "instances"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_removal_changes_only_the_object_and_its_shadow(scenes):
    base = world.replace_values(scenes[0], None, light_azimuth=np.pi / 2, light_elevation=0.8)
    scene = _one_object(base, "sphere", pitch=0.3, height=2.0, size=0.6, z=3.0)
    before, after = _picture(scene), _picture(world.remove_object(scene, 0).scene)
    changed = (before.rgb != after.rgb).any(-1)
    near = np.zeros((SIZE + 2, SIZE + 2), bool)  # the object's pixels and their neighbours (its edge is smoothed)
    for dy in range(3):
        for dx in range(3):
            near[dy : dy + SIZE, dx : dx + SIZE] |= before.instances == 1
    shadow = changed & ~near[1:-1, 1:-1]
    assert changed.sum() > (before.instances == 1).sum() > 20
    assert shadow.sum() > 5
    assert np.all(after.rgb[shadow].astype(int).sum(-1) > before.rgb[shadow].astype(int).sum(-1))
    # Those floor points see the light through the ball: their ray to it passes within its radius (and a pixel's width).
    u, v = _coordinates()
    c, s = np.cos(0.3), np.sin(0.3)
    point = np.array([0, 2.0, 0]) + before.depth[..., None] * np.stack([u, c * v - s, c + s * v], -1)
    light = np.array([np.cos(0.8), np.sin(0.8), 0.0])
    away = point[shadow] - np.array([0, 0.6, 3.0])
    miss = np.linalg.norm(away - (away @ light)[:, None] * light, axis=-1)
    assert miss.max() < 0.6 + 0.25


def test_description_is_exact(scenes):
    scene = world.replace_values(scenes[0], None, exists=False, sky=0, light_azimuth=-1.5, warmth=0.85, floor_kind=1, floor_color=0)
    scene = world.add_object(scene, "cube", "blue", "matte", "small", (1.2, 3.0)).scene
    scene = world.add_object(scene, "sphere", "red", "shiny", "large", (-1.2, 3.0)).scene
    assert world.describe_scene(scene) == (
        "a large red shiny sphere left of a small blue matte cube on a grey checkered floor under a blue sky, warm light from the left"
    )
    near, far = world.replace_values(scene, 1, position=(0.0, 3.0)), world.replace_values(scene, 1, position=(0.0, 5.0))
    near, far = (world.replace_values(x, 0, position=(0.05, 4.0)) for x in (near, far))
    assert "red shiny sphere in front of a small blue" in world.describe_scene(near)
    assert "red shiny sphere behind a small blue" in world.describe_scene(far)
    empty = world.replace_values(scene, None, exists=False)
    assert world.describe_scene(empty).startswith("nothing on a grey checkered floor")


def test_edits_do_what_they_say_and_leave_the_original(scenes):
    scene = _one_object(scenes[0], "cube")
    scene = world.replace_values(scene, 0, color=list(COLORS).index("red"), material=MATERIALS.index("matte"), size=0.4)
    for edit, words, reverse, field in (
        (world.recolor(scene, 0, "blue"), "make the red cube blue", "make the blue cube red", "color"),
        (world.replace_shape(scene, 0, "cone"), "replace the red cube with a cone", "replace the red cone with a cube", "shape"),
        (world.resize(scene, 0, "large"), "make the red cube larger", "make the red cube smaller", "size"),
        (world.change_material(scene, 0, "shiny"), "make the red cube shiny", "make the red cube matte", "material"),
        (world.move_object(scene, 0, "left", 1.0), "move the red cube left", "move the red cube right", "position"),
        (world.remove_object(scene, 0), "remove the red cube", "add a small red matte cube", "exists"),
        (world.change_sky(scene, "night"), "change the sky to a night sky", None, "sky"),
    ):
        assert edit.words == words
        assert reverse is None or edit.reverse == reverse
        differing = [n for n in scene._fields if not np.array_equal(getattr(scene, n), getattr(edit.scene, n))]
        assert differing == [field]
    added = world.add_object(scene, "dome", "green", "striped", "large", (1, 4))
    assert added.words == "add a large green striped dome"
    assert world.remove_object(added.scene, 1).reverse == added.words
    floor = world.change_floor(scene, "olive", "tiled")
    assert floor.after == "has an olive tiled floor"


def test_wrong_names_are_told(scenes):
    with pytest.raises(UserError, match="color 'mauve' is unknown: choose from red"):
        world.recolor(scenes[0], 0, "mauve")
    full = world.replace_values(scenes[0], None, exists=True)
    with pytest.raises(UserError, match="already holds 6 objects"):
        world.add_object(full, "cube", "red", "matte", "large", (0, 3))


def test_places_keep_solids_apart():
    for seed in range(4):
        batch = jax.device_get(world.sample_scenes(jax.random.key(seed), 8, 6, 6))
        assert batch.exists.all()
        gap = np.linalg.norm(batch.position[:, :, None] - batch.position[:, None], axis=-1) + 10 * np.eye(6)
        reach = 1.07 * (batch.size[:, :, None] + batch.size[:, None])
        assert np.all(gap > reach)


def test_near_and_plain_scenes():
    """Zoom enlarges what stands in the middle; plain takes patterns away and nothing else."""
    from xprompt_jax.data.pairs import scene_sources

    far, near, plain = (scene_sources(3, 4, 32, **options) for options in ({}, {"zoom": 1.5}, {"plain": True}))
    covered = lambda sources: np.mean([s.render.segmentation > 1 for s in sources])
    assert covered(near) > 1.2 * covered(far)
    for a, b in zip(far, plain, strict=True):
        np.testing.assert_array_equal(a.render.segmentation, b.render.segmentation)
        np.testing.assert_array_equal(a.render.depth, b.render.depth)
        assert set(np.asarray(b.scene.material)) == {0} and int(b.scene.floor_kind) == 0
