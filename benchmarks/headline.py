"""What a reader should know first: ours, the peer, and the benchmarks that say it."""

PAPERS = ("ae_embedding", "reweighting")
ROWS = [
    (
        "`ae_embedding` head step, embedding 128, 256, 512",
        "`simclr_plain` with the same widths",
        [f"test_ae_head_against_the_papers_default[{d}]" for d in (128, 256, 512)],
    ),
    (
        "`ae_embedding` head step (256)",
        "lightly's default SimCLR head (2048)",
        ["test_papers_heads_against_simclr[ae_embedding]"],
    ),
    ("`reweighting` head step", "the same", ["test_papers_heads_against_simclr[reweighting]"]),
    (
        "presets' head steps, least and most",
        "lightly's own heads",
        ["test_head_against_lightly*"],
    ),
    (
        "presets of solo-learn's recipes, least and most",
        "solo-learn's own modules",
        ["test_head_against_solo*"],
    ),
    (
        "`simclr`, `byol`, `barlow_twins` head steps in bfloat16",
        "lightly's own",
        [f"test_head_in_bfloat16[{head}]" for head in ("simclr", "byol", "barlow_twins")],
    ),
    (
        "whole SimCLR step, ResNet-18: own preset, `ae_embedding`, `reweighting`",
        "the same step with lightly's own head",
        [f"test_training_step[simclr-resnet18-{h}-float32]" for h in ("simclr", *PAPERS)],
    ),
    (
        "whole Barlow Twins step: the same heads",
        "the same",
        [
            f"test_training_step[barlow_twins-resnet18-{h}-float32]"
            for h in ("barlow_twins", *PAPERS)
        ],
    ),
    (
        "autoencoder pretraining",
        "Lightning with a PIL loader; with tensors; a plain loop",
        [f"test_pretraining[{peer}]" for peer in ("lightning_and_pil", "lightning", "loop")],
    ),
    (
        "five taps on a ResNet-18, a block for each batch",
        "the bare forward",
        ["test_five_taps_against_the_bare_forward"],
    ),
    ("the same in one block", "five plain hooks", ["test_five_taps_in_one_block_against_hooks"]),
    (
        '`features(at="layer1")`, 2, 3, 4',
        "the whole forward",
        [f"test_early_exit_against_the_whole_forward[layer{i}]" for i in (1, 2, 3, 4)],
    ),
    (
        "the same, layers 1, 2, 3",
        "torchvision's pruned graph",
        [f"test_early_exit_against_torchvisions_pruned_graph[layer{i}]" for i in (1, 2, 3)],
    ),
    ("all stages by `features`", "timm's `forward_intermediates`", ["test_stages_against_timm"]),
    (
        "extraction to disk, writes and checksums included",
        "the bare forward loop",
        ["test_extraction_to_disk_against_the_bare_forward_loop"],
    ),
    (
        "kNN with 64 settings",
        "the dearest of them alone",
        ["test_a_grid_of_64_against_its_dearest_setting"],
    ),
    ("kNN with one setting", "lightly's `knn_predict`", ["test_one_setting_against_lightly"]),
    (
        "kNN with 64 settings",
        "solo-learn's classifier, one of 64",
        ["test_64_settings_against_solo_learn"],
    ),
    (
        "linear probes of six taps, 1 learning rate",
        "lightly's `LinearClassifier`, six runs",
        ["test_linear_probes_of_six_taps_against_lightlys_classifier_with_one_rate[1]"],
    ),
    (
        "the same, 8 learning rates",
        "the same with one",
        ["test_linear_probes_of_six_taps_against_lightlys_classifier_with_one_rate[8]"],
    ),
    (
        "18 linear probes in one pass",
        "a plain SGD loop for one",
        ["test_18_linear_probes_against_a_loop_for_one"],
    ),
    (
        "ridge, 12 penalties and the choice",
        "scikit-learn's `RidgeClassifierCV`",
        ["test_ridge_path_with_its_choice_against_scikit_learn"],
    ),
    (
        "logistic regression, 8 penalties",
        "scikit-learn's, refitted for each",
        ["test_logistic_path_against_scikit_learn_refitted_for_each_penalty"],
    ),
    ("singular spectrum, centred and not", "NumPy's SVD", ["test_spectra_against_numpys_svd"]),
    ("`import headplug`", "`import torch`", ["test_start_against_importing_torch[import]"]),
]
