"""Scores against scikit-image and against cases worked by hand."""

import numpy as np
import pytest

from xprompt_jax.data import palettes
from xprompt_jax.evaluate import metrics


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :52]
    smooth = np.stack([x * 4, y * 5, 128 + 100 * np.sin(x / 5 + y / 7)], -1)
    noisy = smooth + rng.normal(0, 15, smooth.shape)
    return smooth.clip(0, 255).astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)


def test_psnr_and_ssim_equal_scikit_image(images):
    skimage = pytest.importorskip("skimage.metrics")
    a, b = images
    assert metrics.psnr_rgb(a, b) == pytest.approx(skimage.peak_signal_noise_ratio(b, a), abs=1e-9)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert metrics.ssim_rgb_gaussian(a, b) == pytest.approx(skimage.structural_similarity(a, b, channel_axis=2, **wang), abs=1e-6)
    assert metrics.ssim_skimage_default(a, b) == pytest.approx(skimage.structural_similarity(a, b, channel_axis=2), abs=1e-9)


def test_matlab_3d_ssim_equals_scipy_on_a_volume(images):
    filters = pytest.importorskip("scipy.ndimage")
    a, b = (i.astype(float) for i in images)
    smooth = lambda x: filters.gaussian_filter(x, 1.5, radius=5, mode="nearest")
    c1, c2, mean_a, mean_b = 2.55**2, 7.65**2, smooth(a), smooth(b)
    var_a, var_b, covariance = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2, smooth(a * b) - mean_a * mean_b
    expected = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    assert metrics.ssim_matlab_3d(*images) == pytest.approx(expected.mean(), abs=1e-9)
    assert abs(metrics.ssim_matlab_3d(*images) - metrics.ssim_rgb_gaussian(*images)) > 0.01  # another number, as its name says
    assert metrics.ssim_matlab_3d(images[0], images[0]) == pytest.approx(1)


def test_y_protocols_equal_scikit_image_on_rounded_luma(images):
    color, skimage = pytest.importorskip("skimage.color"), pytest.importorskip("skimage.metrics")
    y = [np.rint(color.rgb2ycbcr(i)[..., 0]) for i in images]
    np.testing.assert_array_equal(metrics.luma_matlab_uint8(images[0]), y[0])
    assert metrics.psnr_y(*images) == pytest.approx(skimage.peak_signal_noise_ratio(*y, data_range=255), abs=1e-9)
    expected = skimage.structural_similarity(
        *y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )  # fmt: skip
    assert metrics.ssim_y(*images) == pytest.approx(expected, abs=1e-6)


def test_a_photograph_gives_the_worked_values():
    """One pair, five protocols: what the papers call PSNR and SSIM differs by as much."""
    data = pytest.importorskip("skimage.data")
    image = data.astronaut()[:256, :384]
    noise = np.random.default_rng(0).normal(0, 15, image.shape)
    noisy = np.clip(image + noise, 0, 255).astype(np.uint8)
    worked = {"psnr_rgb": 24.87, "psnr_y": 29.69}
    assert {name: round(getattr(metrics, name)(noisy, image), 2) for name in worked} == worked
    worked = {"ssim_skimage_default": 0.486, "ssim_rgb_gaussian": 0.464, "ssim_y": 0.659, "ssim_matlab_3d": 0.616}
    assert {name: round(getattr(metrics, name)(noisy, image), 3) for name in worked} == worked


def test_palette_adherence_by_hand():
    colours = np.array([[0, 0, 0], [0, 0, 255]], np.uint8)
    picture = np.array([[[0, 0, 0], [0, 3, 251], [0, 0, 10], [0, 0, 10]]], np.uint8)
    assert metrics.palette_distance(picture, colours) == pytest.approx((0 + 5 + 10 + 10) / 4)


def test_luma_ends():
    ends = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], np.uint8)
    np.testing.assert_array_equal(metrics.luma_matlab_uint8(ends), [[16, 235, 81]])


def test_equal_images(images):
    a = images[0]
    assert metrics.psnr_rgb(a, a) == metrics.psnr_y(a, a) == float("inf")
    assert metrics.ssim_rgb_gaussian(a, a) == metrics.ssim_skimage_default(a, a) == metrics.ssim_y(a, a) == pytest.approx(1)
    assert metrics.mean_abs_error(a, a) == 0


def test_uint8_does_not_wrap_around():
    black, dim = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)
    assert metrics.mean_abs_error(black, dim) == 200
    assert metrics.psnr_rgb(black, dim) == pytest.approx(20 * np.log10(255 / 200))


def test_other_shapes_and_small_images_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        metrics.psnr_rgb(np.zeros((4, 4, 3)), np.zeros((4, 1, 3)))
    with pytest.raises(ValueError, match="window of 11"):
        metrics.ssim_rgb_gaussian(np.zeros((10, 20, 3)), np.zeros((10, 20, 3)))


def test_regions():
    source = np.full((2, 2, 3), 100, np.uint8)
    target, output = source.copy(), source.copy()
    target[0, 0, 1] = 109  # 9 levels in one channel: changed
    target[0, 1] = 108  # 8 levels: not changed
    output[0, 0] = (110, 109, 100)  # 10 levels off in one of three channels
    output[1, 1] = (100, 100, 106)
    unchanged = ((target - output.astype(float)) ** 2)[[0, 1, 1], [1, 0, 1]].mean()
    assert metrics.changed_region_psnr(source, output, target) == pytest.approx(10 * np.log10(255**2 / (100 / 3)))
    assert metrics.unchanged_region_psnr(source, output, target) == pytest.approx(10 * np.log10(255**2 / unchanged))
    assert np.isnan(metrics.changed_region_psnr(source, output, source))
    assert np.isnan(metrics.unchanged_region_psnr(source, output, source, threshold=-1))


def test_depth_per_image_and_pooled():
    truth = [np.array([[2.0, 0.0, 4.0, 10.0]]), np.array([[5.0, 0.0, 0.0, 0.0]])]  # 0 and 10 m are not scored
    guess = [np.array([[3.0, 7.0, 4.0, 1.0]]), np.array([[40.0, 0.0, 0.0, 0.0]])]  # 40 m is clipped to 10
    assert metrics.depth_rmse_painter(guess, truth) == pytest.approx((np.sqrt(1 / 2) + 5) / 2)
    assert metrics.depth_rmse_pooled(guess, truth) == pytest.approx(np.sqrt((1 + 0 + 25) / 3))


def test_depth_is_cut_to_the_eigen_crop_and_skips_empty_images():
    truth, guess = np.full((480, 640), 3.0), np.full((480, 640), 3.0)
    guess[:45], guess[471:], guess[:, :41], guess[:, 601:] = 9, 9, 9, 9
    assert metrics.depth_rmse_painter([guess, guess], [truth, np.zeros_like(truth)]) == 0
    guess[45, 41] = 4
    assert metrics.depth_rmse_painter([guess], [truth]) == pytest.approx(np.sqrt(1 / (426 * 560)))
    assert np.isnan(metrics.depth_rmse_painter([guess], [truth * 0])) and np.isnan(metrics.depth_rmse_pooled([], []))
    with pytest.raises(ValueError, match="depth map"):
        metrics.depth_rmse_painter(guess, truth)  # rows in place of images


def test_normal_angles():
    at = lambda degrees: [np.sin(np.radians(degrees)), 0, np.cos(np.radians(degrees))]
    truth = np.array([[at(0), at(0), at(0), at(0), [0, 0, 0]]])
    guess = np.array([[at(0), at(10), np.multiply(3, at(20)), at(180), at(50)]])
    scores = metrics.normal_angles([guess], [truth])
    assert scores == pytest.approx({"mean": 52.5, "median": 15, "11.25": 0.5, "22.5": 0.75, "30": 0.75})
    assert metrics.normal_angles([guess], [truth], [np.array([[1, 1, 0, 0, 1]])])["mean"] == pytest.approx(5)
    assert np.isnan(metrics.normal_angles([guess], [truth * 0])["mean"])


def test_normal_angles_equal_the_arc_cosine_of_bae_et_al():
    rng = np.random.default_rng(1)
    truths = [rng.normal(size=(80, 90, 3)) * (rng.random((80, 90, 1)) < 0.9) for _ in range(2)]
    guesses = [t + 0.4 * rng.normal(size=t.shape) for t in truths]
    t, g = (np.concatenate([part[truth.any(-1)] for part, truth in zip(parts, truths, strict=True)]) for parts in (truths, guesses))
    cosine = np.sum(t * g, -1) / np.linalg.norm(t, axis=-1) / np.linalg.norm(g, axis=-1)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    expected = {"mean": angle.mean(), "median": np.median(angle), **{f"{a}": np.mean(angle < a) for a in (11.25, 22.5, 30)}}
    assert metrics.normal_angles(guesses, truths) == pytest.approx(expected, rel=1e-6)


def test_median_angle_of_summed_histograms():
    rng = np.random.default_rng(0)
    truths = [rng.normal(size=(200, 200, 3)) for _ in range(3)]
    guesses = [t + rng.normal(size=t.shape) * s for t, s in zip(truths, (0.1, 0.5, 2), strict=True)]
    histogram = sum(metrics.angle_histogram(g, t) for g, t in zip(guesses, truths, strict=True))
    assert metrics.median_angle(histogram) == pytest.approx(metrics.normal_angles(guesses, truths)["median"], abs=0.005)  # of some 30
    assert np.isnan(metrics.median_angle(histogram * 0))
    # Ten pixels between 20.0 and 20.1 degrees, two below: half of twelve is four tenths into the bin.
    counts = np.bincount([3, 7] + [200] * 10, minlength=metrics.ANGLE_BINS)
    assert metrics.median_angle(counts) == pytest.approx(20.04)


def test_mean_iou_sums_counts_over_images():
    truth = [np.array([[0, 0, 1, -1]]), np.array([[0, 2, 255, 1]])]
    guess = [np.array([[0, 1, 1, 0]]), np.array([[0, -1, 0, 7]])]
    # class 0: 2 hits, union 3; class 1: 1 hit, union 3; class 2: no hit, union 1; class 3: nowhere.
    assert metrics.mean_iou(guess, truth, 4) == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert np.isnan(metrics.mean_iou([np.zeros((1, 1), int)], [-np.ones((1, 1), int)], 4))


def test_mean_iou_and_depth_equal_plain_definitions():
    """150 classes by sets of pixels; depth through masked arrays."""
    rng = np.random.default_rng(2)
    truth = rng.integers(-1, 150, (40, 60))
    guess = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 150, truth.shape)).clip(0)
    scored = truth >= 0
    ratios = []
    for label in range(150):
        a, b = set(np.flatnonzero((guess == label) & scored)), set(np.flatnonzero(truth == label))
        ratios += [len(a & b) / len(a | b)] if a | b else []
    assert metrics.mean_iou([guess], [truth], 150) == pytest.approx(np.mean(ratios), rel=1e-9)

    truths, guesses = rng.uniform(-1, 12, (2, 3, 480, 640))
    hidden = np.ones((480, 640), bool)
    hidden[45:471, 41:601] = False
    errors = [np.ma.array(np.clip(g, 1e-3, 10) - t, mask=hidden | (t <= 1e-3) | (t >= 10)) for g, t in zip(guesses, truths, strict=True)]
    assert metrics.depth_rmse_painter(guesses, truths) == pytest.approx(np.mean([np.ma.sqrt((e**2).mean()) for e in errors]), rel=1e-9)
    pooled = np.sqrt(sum((e**2).sum() for e in errors) / sum(e.count() for e in errors))
    assert metrics.depth_rmse_pooled(guesses, truths) == pytest.approx(pooled, rel=1e-9)


def noisy(colours, sigma, rng):
    """What a lossy tokenizer does to them."""
    return np.clip(np.rint(colours + rng.normal(0, sigma, colours.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma, painter, separated", [(12, 0.82, 0.95), (16, 0.61, 0.81)])
def test_class_colours_under_noise_give_the_worked_shares(sigma, painter, separated):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 150, 10_000)
    for palette, share in ((palettes.painter_ade(), painter), (palettes.max_separation(150), separated)):
        assert np.mean(palette.decode(noisy(palette.encode(labels), sigma, rng)) == labels) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("name, at_8, at_16", [
    ("grey", 0.180, 0.355), ("spectral", 0.197, 0.413), ("viridis", 0.228, 0.465), ("magma", 0.157, 0.315), ("rdylbu", 0.122, 0.243),
    ("turbo", 0.100, 0.200), ("jet", 0.083, 0.163),
])  # fmt: skip
def test_depth_colours_under_noise_give_the_worked_errors(name, at_8, at_16):
    rng = np.random.default_rng(0)
    depth = rng.uniform(0.5, 9.99, (80, 100))
    palette = palettes.get_palette(name)
    for sigma, error in ((8, at_8), (16, at_16)):
        decoded = palette.decode(noisy(palette.encode(depth), sigma, rng))
        assert metrics.depth_rmse_painter([decoded], [depth]) == pytest.approx(error, abs=0.012)
