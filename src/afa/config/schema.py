"""Every key of the configuration: type, range, default, meaning. One frozen dataclass a section.

A default is the `paper` preset on PASCAL VOC: what the published code does (docs/differences.md lists where that
departs from the paper). The text under a key states its unit and source; `afa keys` and docs/configuration.md show it.
`afa.config.load` reads and checks values; what they mean is up to the modules that take them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Final, Literal

from msgspec import Meta

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Pooling = Literal["gmp", "gap", "topk"]
Refinement = Literal["par", "par_color", "pamr", "crf", "none"]
Propagation = Literal["affinity", "attention", "none"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Supervision = Literal["tags", "masks"]
Tracker = Literal["wandb", "mlflow", "trackio"]
SUPERVISION_NAMES: Final[dict[Supervision, str]] = {
    "tags": "weakly supervised (image tags)",
    "masks": "fully supervised (masks)",
}
"""The words for a run's supervision wherever its results are shown."""
Protocol = Literal["single", "multiscale", "single+crf", "multiscale+crf"]
_CRF: Final = "+crf"
BACKGROUND_WORDS: Final = (
    *("building", "grass", "tree", "wall", "wall-concrete", "sky", "water", "river", "sea", "railroad", "keyboard"),
    *("clouds", "house", "mountain", "road", "rock", "pavement", "bridge", "ground", "stop sign", "dirt"),
    *("floor-wood", "sand", "snow", "fence", "playingfield", "hill", "leaves", "bush", "platform"),
)
"""Scenery of COCO-Stuff, most of it also among the background words of CLIP-ES (Lin et al. 2023)."""
LayoutName = Literal[
    "auto", "voc", "table", "imagefolder", "hf", "shards", "coco", "labelstudio", "cvat", "yolo", "labelme"
]


@dataclass(frozen=True)
class DataConfig:
    """Where images, tags and lists lie. Paths are relative to `root` unless absolute."""

    root: str = ""
    """Folder of the data set, or shards: a folder, a file, a pattern such as DIR/{0000..0099}.tar, or the address of a
    store such as s3://bucket/folder. Required by train and evaluate."""
    image_dir: str = "JPEGImages"
    """Folder of the images, found by name with any common suffix."""
    mask_dir: str = "SegmentationClassAug"
    """Folder of the index-PNG masks; read by evaluation only, may be absent."""
    mask_values: tuple[Annotated[int, Meta(ge=0, le=255)], ...] = ()
    """Values that masks have for the background and the classes, in their order: 0,255 where white is the first class.
    Empty: 0, 1, ... C, and 255 where nothing is scored."""
    train_list: str = "lists/train.txt"
    """Text file, one image name a line."""
    val_list: str = "lists/val.txt"
    """Text file, one image name a line: images that evaluation scores. Empty: no evaluation."""
    tags: str = ""
    """Tags: CSV `image,tags`, `.npy` dictionary of one-hot vectors, or a folder of VOC XML. Empty: the first
    of lists/tags.csv, tags.csv, lists/cls_labels_onehot.npy, cls_labels_onehot.npy, Annotations/ that exists."""
    classes: tuple[str, ...] = ()
    """Names of the C foreground classes in index order (mask value = position + 1). Empty: classes.txt of
    the root when there is one, else the 20 classes of VOC."""
    class_subset: tuple[str, ...] = ()
    """Train and evaluate on these classes only: other tags are dropped, other classes' pixels are ignored (255),
    and images left without a tag are an error. Empty: all classes."""
    negatives: tuple[str, ...] = ("background", "none", "negative")
    """Tags, and folders of classes, that say that an image holds none of the classes; a name that the class list has
    stays a class. Such images train as background everywhere, and are scored."""
    layout: LayoutName = "auto"
    """How images and tags lie in `root` (docs/data.md): auto finds out and says it."""
    skip_missing: bool = False
    """Leave out, and count, entries of tags whose image is missing; as --skip-missing. Else they are an error."""
    split_fraction: Annotated[float, Meta(ge=0.0, le=0.9)] = 0.2
    """Share of the images set aside for validation where the data states no split; the VOC layout always does."""
    split_seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """Seed of that split: the same images, tags and seed give the same sides."""
    white_level: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 65535
    """Value of gray images of more than 8 bits that is white: 4095 for 12-bit pictures in 16-bit files, for example."""
    skip_broken: bool = False
    """Leave out, and count, images that cannot be read; each is read once before training or scoring. Off: an error."""
    workers: Annotated[int, Meta(ge=-1, le=256)] = -1
    """Threads that decode images; 0 works in the training thread, -1 picks by cores."""
    cache_gib: Annotated[float, Meta(ge=-1.0, le=1e6)] = -1.0
    """Memory for decoded images, GiB over all processes of a machine: those that fit are decoded once. -1 takes up to
    a quarter of what is free at the start (Linux; elsewhere none), 0 decodes each time. Results are the same."""

    large_gib: Annotated[float, Meta(ge=0.0, le=1e6)] = 20.0
    """Disk for images of more than 16 megapixels, GiB: they are decoded once, into the folder `pixels` of the run, and
    a crop reads its part alone. Images beyond that are decoded each time, as all are with 0."""

    shard_gib: Annotated[float, Meta(ge=0.0, le=1e6)] = 50.0
    """Disk for shards that come from a store or are repacked from Parquet, GiB, below XDG_CACHE_HOME. Where all of them
    take more than half of it, training shuffles within windows of shards that take a quarter of it."""
    store_retries: Annotated[int, Meta(ge=0, le=100)] = 6
    """How often a store that fails is asked again, after pauses from 0.2 s that double, up to 30 s."""

    feature_dir: str = ""
    """Folder of the feature cache, on a fast disk; runs may share it. Empty: the folder `features` of the run."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """`classes` without the words that they may state."""
        return tuple(entry.partition(": ")[0].strip() for entry in self.classes)


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation. Source: paper section 4.1."""

    crop_size: Annotated[int, Meta(ge=32, le=4096)] = 512
    """Side of the square crop, pixels; best a multiple of the encoder's stride: 32 for MiT, its patch for others."""
    scale_min: Annotated[float, Meta(ge=0.05, le=10.0)] = 0.5
    """Smallest random rescaling factor."""
    scale_max: Annotated[float, Meta(ge=0.05, le=10.0)] = 2.0
    """Largest random rescaling factor."""
    flip_probability: Share = 0.5
    """Probability of a horizontal flip."""
    short_side: Annotated[int, Meta(ge=0, le=4096)] = 0
    """Images are first scaled so that their shorter side has this many pixels; 0 keeps the native size
    (the reference)."""
    whole_images: bool = False
    """No random scale and place: each image as a whole, as large as fits into the crop, in its middle. It is still
    flipped at random."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. Source: paper sections 3.1, 3.3 and 4.1."""

    backbone: str = "mit_b1"
    """Architecture: mit_b0 .. mit_b5, dinov2_small_reg, clip_b16, ... (docs/backbones.md), or a tiny one for
    generated data: mit_tiny (0.7 M parameters), dinov2_tiny."""
    weights: str = "nvidia/mit-b1"
    """Initial encoder weights: a local folder, a hub id, an original SegFormer `mit_b*.pth`, or empty for
    random ones. nvidia/mit-b* are under NVIDIA's non-commercial license."""
    second_backbone: str = ""
    """Architecture of a second encoder, a plain vision transformer such as dinov2_base_reg or dinov3_base: it stays
    frozen, and its features join those of `backbone` in the decoder. Empty: none."""
    second_weights: str = ""
    """Weights of the second encoder: a local folder or a hub id. Empty: the published ones of its architecture."""
    second_feature_levels: Annotated[int, Meta(ge=1, le=24)] = 1
    """Feature maps of the second encoder that the decoder sees, of evenly spaced blocks; 1 is its output."""
    second_similarity: bool = False
    """classifier = text: class scores walk along the similarity of the second encoder's tokens, not along the attention
    of the first one."""
    drop_path: Annotated[float, Meta(ge=0.0, le=0.9)] = 0.1
    """Stochastic depth of the last block; linear over depth."""
    pooling: Pooling = "gmp"
    """Global pooling of the classifier: gmp = maximum, gap = mean, topk = mean of the largest values (Table 1)."""
    pooling_percent: Annotated[float, Meta(ge=0.0, le=100.0)] = 25.0
    """Share of the positions that `topk` averages, percent; at least one position."""
    decoder_width: Annotated[int, Meta(ge=8, le=4096)] = 256
    """Channels of the all-MLP decoder."""
    decoder_dropout: Annotated[float, Meta(ge=0.0, le=0.9)] = 0.1
    """Dropout before the decoder's last layer."""
    affinity_blocks: Annotated[int, Meta(ge=1, le=64)] = 2
    """How many of the last blocks give their attention to the affinity head."""
    freeze_blocks: Annotated[int, Meta(ge=0, le=64)] = 0
    """The encoder's embedding and its first blocks up to this number keep their initial weights."""
    feature_levels: Annotated[int, Meta(ge=1, le=24)] = 4
    """Feature maps of a plain vision transformer that the decoder sees, of evenly spaced blocks; MiT has 4."""
    decoder_init: Literal["kaiming", "uniform"] = "kaiming"
    """Initial weights of the decoder's fusing layer: kaiming = normal by fan out (reference), or PyTorch's own."""
    norm_eps: Annotated[float, Meta(ge=1e-12, le=1e-2)] = 1e-6
    """MiT: epsilon of the norm layers in blocks and after stages; transformers' SegFormer has 1e-5 there."""
    attention_scaling: bool = False
    """Divide Q K^T by sqrt(d) before the affinity head (paper, Eq. 1); the reference does not."""
    affinity_init: Literal["published", "calibrated"] = "published"
    """How the affinity head starts: published = random weights, which saturate its sigmoid with some seeds; calibrated
    = the mean of the attention maps, its logits scaled to mean 0 and standard deviation 1 on the first images."""
    classifier: Literal["learned", "text"] = "learned"
    """Where class scores come from: learned = a classifier that learns from the tags (the method); text = the class
    names, compared with the image in the space of an encoder that was trained with texts, such as clip_b16."""
    text_embeddings: str = ""
    """classifier = text: folder with embeddings.safetensors and names.json. Empty: the text encoder of `weights`."""
    text_templates: tuple[str, ...] = ("a photo of a {}",)
    """classifier = text: sentences with {} in the place of a word; their vectors are averaged."""
    background_words: tuple[str, ...] = BACKGROUND_WORDS
    """classifier = text: words for what is no class; a word of a class never competes with it."""
    text_sharpness: Annotated[float, Meta(ge=1.0, le=1000.0)] = 50.0
    """classifier = text: factor of the cosines between image and words before the softmax."""


@dataclass(frozen=True)
class PseudoConfig:
    """From class scores to pseudo labels. Source: paper sections 3.2 to 3.4."""

    scales: tuple[Annotated[float, Meta(ge=0.1, le=4.0)], ...] = (1.0, 0.5, 1.5)
    """Input scales of the multi-scale CAM, each with its horizontal flip."""
    mirror: bool = True
    """Run the mirror image at each scale, too."""
    reuse_training_pass: bool = True
    """Take the scale-1, unflipped scores from the training forward instead of a pass of their own. That
    forward has stochastic depth on, as the reference's own passes have."""
    background_low: Share = 0.35
    """beta_l: background score of the label that claims foreground easily (Eq. 4)."""
    background_high: Share = 0.55
    """beta_h: background score of the label that claims foreground cautiously (Eq. 4)."""
    background_cam: Share = 0.45
    """Background score when CAMs are scored as labels."""
    background_propagated: Share = 0.35
    """Background score when propagated CAMs are scored as labels."""
    propagated_scale: Literal["one", "largest"] = "one"
    """Scale of the pass whose affinity propagated CAMs walk on when they are scored or shown: one (reference), or the
    largest of `scales`, as in training."""
    label_rule: Literal["two_pass", "threshold"] = "two_pass"
    """How two background scores become one label: two_pass = softmax, refine and argmax once for each, then
    merge (reference); threshold = refine the CAM, then Eq. 4 as printed (paper)."""
    refinement: Refinement = "par"
    """Low-level refinement: par, par_color (no position term), pamr, none (Table 4), or crf: the dense CRF with the
    published settings, many times slower."""
    refinement_region: Literal["reference", "canvas"] = "reference"
    """Where refinement looks: reference = the initial label on the whole canvas, the refined label inside
    the valid box; canvas = both on the whole canvas, so that one kernel serves every crop."""
    refinement_stride: Annotated[int, Meta(ge=1, le=8)] = 2
    """Labels are refined at 1/stride of the image size."""
    dilations: tuple[Annotated[int, Meta(ge=1, le=256)], ...] = (1, 2, 4, 8, 12, 24)
    """Dilations of the 8 neighbors, pixels."""
    iterations: Annotated[int, Meta(ge=0, le=1000)] = 10
    """Refinement iterations (COCO: 15)."""
    par_image: Literal["truncated", "exact"] = "truncated"
    """Levels of the image that PAR sees: truncated after the normalization is undone, so that seven of them are one too
    low (reference), or exact."""
    rgb_bandwidth: Annotated[float, Meta(ge=1e-6, le=1e3)] = 0.3
    """w1 of Eq. 8."""
    pos_bandwidth: Annotated[float, Meta(ge=1e-6, le=1e3)] = 0.3
    """w2 of Eq. 8."""
    pos_weight: Annotated[float, Meta(ge=0.0, le=1e3)] = 0.01
    """w3 of Eq. 9."""
    affinity_radius: Annotated[int, Meta(ge=1, le=1024)] = 8
    """Pairs farther apart than this Chebyshev distance, in tokens, carry no affinity."""
    affinity_power: Annotated[float, Meta(ge=0.0, le=64.0)] = 2.0
    """alpha of Eq. 6."""
    walk_epsilon: Annotated[float, Meta(ge=0.0, le=1e3)] = 0.1
    """Added to the degree that normalizes the transition matrix; the paper has 0, the reference 0.1."""
    walk_steps: Annotated[int, Meta(ge=1, le=64)] = 1
    """Steps of the random walk; the paper has one."""
    propagation: Propagation = "affinity"
    """What the random walk walks on: the learned affinity, the mean attention of the last blocks, or none: no
    walk (Table 3)."""
    softmax_scores: bool = True
    """Softmax over background and present classes before refinement and walk (reference); off: the
    scores as they are (paper)."""
    crf: bool = False
    """Pseudo labels that are written or scored also go through the dense CRF, with its settings in `evaluation`, after
    the refinement. Those of the training never do."""


@dataclass(frozen=True)
class LossConfig:
    """Weights and forms of the losses. Source: paper Eq. 5, 11, 12."""

    segmentation_weight: Annotated[float, Meta(ge=0.0, le=1e3)] = 0.1
    """lambda_1 of Eq. 12."""
    affinity_weight: Annotated[float, Meta(ge=0.0, le=1e3)] = 0.1
    """lambda_2 of Eq. 12. 0 switches the affinity learning off (Tables 2 and 3, w/o AFA)."""
    energy_weight: Annotated[float, Meta(ge=0.0, le=1e3)] = 0.01
    """lambda_3 of Eq. 12: weight of the dense energy loss. 0 leaves it out, as the released code does."""
    segmentation_form: Literal["balanced", "plain"] = "balanced"
    """balanced = half background pixels, half foreground pixels (reference); plain = one mean over all
    labelled pixels (paper)."""
    segmentation_stride: Annotated[int, Meta(ge=1, le=16)] = 1
    """The segmentation loss looks at one pixel of this many in each direction: features at stride 16 say little more,
    and a step costs far less. 1: at every pixel (the reference)."""
    reduction: Literal["process", "batch"] = "process"
    """Over which images the segmentation and the affinity loss are means: those of each process, averaged over
    processes (reference: two images each), or the whole batch, so that the number of processes changes nothing."""
    affinity_form: Literal["balanced", "paper"] = "balanced"
    """balanced = halves, each over count + 1 (reference); paper = sums over the bare counts, no halves."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Optimizer and phases. Source: paper section 4.1. Steps are counted from 0."""

    max_steps: Annotated[int, Meta(ge=1)] = 20_000
    """Training steps."""
    batch_size: Annotated[int, Meta(ge=1)] = 8
    """Images per step, over all processes."""
    cls_steps: Annotated[int, Meta(ge=0)] = 2_001
    """Steps that learn the classification alone (COCO: 5,001). In the reference step 2,000 is the last of them."""
    refined_steps: Annotated[int, Meta(ge=0)] = 6_000
    """Steps after which the segmentation learns from the refined label (COCO: 15,000)."""
    affinity_target: Literal["initial", "segmentation"] = "initial"
    """Label that supervises the affinity: always the initial label (VOC), or whatever label the segmentation learns
    from at that step (COCO)."""
    learning_rate: Annotated[float, Meta(ge=0.0, le=10.0)] = 6e-5
    """AdamW learning rate of the encoder after the warm-up."""
    head_lr_factor: Annotated[float, Meta(ge=0.0, le=1e4)] = 10.0
    """Learning rate of everything else, over the encoder's."""
    weight_decay: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.01
    """AdamW weight decay."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW betas."""
    warmup_steps: Annotated[int, Meta(ge=0)] = 1_500
    """Steps of linear warm-up."""
    warmup_ratio: Share = 1e-6
    """Learning rate at step 0, over the full one."""
    poly_power: Annotated[float, Meta(ge=0.0, le=10.0)] = 1.0
    """Exponent of the polynomial decay."""
    poly_offset: bool = False
    """Count the decay from the end of the warm-up; the reference counts it from step 0."""
    freeze_norms: bool = True
    """Keep the encoder's norm layers at their initial values (reference). Off for training from scratch."""
    grad_clip: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.0
    """Largest gradient norm; 0 clips nothing (the reference)."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How masks are scored. Source: docs/method.md, "Evaluation"."""

    protocol: Protocol = "single"
    """single = one pass at native size; multiscale = long side `long_side`, `scales` with flips, mean over
    flip, maximum over scales. +crf: their softmax goes through the dense CRF."""
    scales: tuple[Annotated[float, Meta(ge=0.1, le=4.0)], ...] = (1.0, 0.5, 0.75)
    """Scales of the multiscale protocol (0.5 to 1.5 by the authors' word; these by their script)."""
    long_side: Annotated[int, Meta(ge=32, le=8192)] = 512
    """Longer side of the image in the multiscale protocol, pixels."""
    multiscale_rule: Literal["reference", "direct"] = "reference"
    """reference = the image at `long_side` is scaled on, sizes are rounded down, and the maximum is taken on the grid
    of scale 1's logits; direct = each scale from the image itself, rounded, and the maximum at its size."""
    batch_size: Annotated[int, Meta(ge=0, le=256)] = 0
    """Images of one size that go through the network together; larger ones than 512 x 512 fewer. 0 = automatic: 8 on
    a GPU, else 1."""
    short_side: Annotated[int, Meta(ge=0, le=4096)] = 0
    """Single scale and pseudo labels: images are scaled to this shorter side first, logits and labels are scaled
    back to the native size; 0 = native."""
    crf_iterations: Annotated[int, Meta(ge=0, le=1000)] = 10
    """Mean-field updates of the dense CRF."""
    crf_gaussian_weight: Annotated[float, Meta(ge=0.0, le=1e3)] = 3.0
    """Weight of its kernel of positions."""
    crf_gaussian_xy: Annotated[float, Meta(ge=0.1, le=1e4)] = 3.0
    """Bandwidth of that kernel, pixels."""
    crf_bilateral_weight: Annotated[float, Meta(ge=0.0, le=1e3)] = 4.0
    """Weight of its kernel of positions and colors."""
    crf_bilateral_xy: Annotated[float, Meta(ge=0.1, le=1e4)] = 64.0
    """Bandwidth of that kernel over positions, pixels."""
    crf_bilateral_rgb: Annotated[float, Meta(ge=0.1, le=1e3)] = 5.0
    """Bandwidth of that kernel over colors, levels of 0..255."""

    @property
    def multiscale(self) -> bool:
        """Whether the protocol has several scales."""
        return self.protocol.startswith("multiscale")

    @property
    def crf(self) -> bool:
        """Whether masks go through the dense CRF."""
        return self.protocol.endswith(_CRF)

    def with_crf(self, crf: bool) -> EvaluationConfig:
        """The same protocol with the dense CRF or without it."""
        plain: Literal["single", "multiscale"] = "multiscale" if self.multiscale else "single"
        return replace(self, protocol=f"{plain}{_CRF}" if crf else plain)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainConfig:
    """How a run is carried out; nothing here belongs to the method."""

    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    """Seed of everything random: the order, augmentation, initial weights, dropout."""
    class_balance: Share = 0.0
    """How far images with rare classes are repeated: an image comes max(1, (mean / n)^class_balance) times an epoch, n
    being the number of images of its rarest class and mean that of all classes. 0 = once each; 1 = no class comes less
    often than the mean. Source: repeat factor sampling (LVIS, Gupta et al. 2019)."""
    max_images: Annotated[int, Meta(ge=0)] = 0
    """Train on at most so many of the images that have a class, and on as large a share of the others; 0 = on all. The
    seed draws them, those with rare classes more likely, as `train.class_balance` says, and each class keeps an image
    if so many are enough; the feature cache holds these alone."""
    negative_share: Share = 0.5
    """Largest share of a batch's images that hold none of the classes; they come as often as others unless that would
    be more. 0 = such images are scored, and never train."""
    supervision: Supervision = "tags"
    """tags = weak supervision, the method. masks = full supervision, for comparison (Table 5): the segmentation learns
    from the true masks of the training list, without pseudo labels; everything that shows results says so."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto = cuda, else mps, else cpu."""
    precision: Precision = "fp32"
    """Arithmetic of the network; pseudo labels and losses are always fp32. auto = bf16 where the device has fast bf16
    (GPUs since Ampere, CPUs with AVX-512 BF16 or AMX), else fp32."""
    log_steps: Annotated[int, Meta(ge=1)] = 20
    """Steps between two lines of metrics.jsonl."""
    eval_steps: Annotated[int, Meta(ge=0)] = 2_000
    """Steps between two evaluations of `eval_images` images; 0 = only at the end."""
    eval_images: Annotated[int, Meta(ge=1)] = 100
    """Images of an evaluation during training; the one at the end scores the whole list."""
    save_steps: Annotated[int, Meta(ge=1)] = 500
    """Steps between two checkpoints."""
    label: str = ""
    """What `afa report --compare` calls the run; empty: its folder's name. `tableN: ROW` names a row of the paper's
    tables (docs/reproduce.md), whose figures are shown beside the run's."""
    example_images: Annotated[int, Meta(ge=0, le=64)] = 8
    """Images shown in report.html."""
    cuda_graphs: bool = True
    """On one GPU, record each phase's step once and replay it, so that launching kernels never limits it. Off where
    the precision is fp16."""
    compile: bool = False
    """Let torch.compile fuse the network's kernels; takes a minute or more at the start of each phase."""
    shard: bool = False
    """Spread weights, gradients and optimizer over the processes of a training (FSDP), for encoders that are too large
    for one device. The result is the same, and checkpoints go on with it or without it."""
    feature_cache: bool = False
    """Run the encoder once for each image that a step takes, keep its features on disk, and train from there.
    Needs `model.classifier` = text, all blocks frozen, `augment.whole_images`, `pseudo.scales` = 1 and no `mirror`."""
    feature_cache_gib: Annotated[float, Meta(ge=0.0, le=1e6)] = 20.0
    """Most that the feature cache may take on disk, GiB."""
    tensorboard: bool = True
    """Also write TensorBoard events when the tensorboard package is installed."""
    trackers: tuple[Tracker, ...] = ()
    """Also tell these of the run, each through its own library and its own environment variables: wandb, mlflow,
    trackio."""


@dataclass(frozen=True)
class Config:
    """The whole configuration: one frozen dataclass per section."""

    preset: str = "paper"
    """Named starting values: paper (VOC, reference behavior), paper_coco, rrm (the baseline of Table 5), or demo
    (generated data, from scratch)."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pseudo: PseudoConfig = field(default_factory=PseudoConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
