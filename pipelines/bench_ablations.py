"""The ablation rows of the distillation benchmark, as options over a method's frozen weights."""

from __future__ import annotations

from typing import Any

__all__ = ["ABLATIONS", "OWN_WEIGHTS", "SIM_AT_TEST", "STUDENT_ABLATIONS"]

# Name -> options, by method: the papers' ablation tables and our own. A row that changes the network is compared with the
# undistilled twin of that network (``bench_rows.undistilled``). What is not here
# stands in the table under another name: IMKD's unsupervised stage 3 and DualDistill's head start alone are their twins,
# DualDistill without head start is `plain`, IMKD without intensity is a control.
_OFF_IMKD = {"stage1": False, "stage2_lidar": False, "stage2_label": False, "response": "off", "stage3_supervision": False}
_NO_STAGE3 = {"stage3": False, "stage3_supervision": False}
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "imkd": {
        "03_stage3_supervised": {**_OFF_IMKD, "stage3_supervision": True},
        "04_stage1_plain": {**_OFF_IMKD, **_NO_STAGE3, "stage1": True, "intensity_source": "none"},
        "05_stage1_reflectance": {**_OFF_IMKD, **_NO_STAGE3, "stage1": True},
        "06_stage2_lidar_plain": {**_OFF_IMKD, **_NO_STAGE3, "stage2_lidar": True, "intensity_source": "none", "eta": 0.0},
        "07_stage2_lidar_reflectance": {**_OFF_IMKD, **_NO_STAGE3, "stage2_lidar": True},
        "08_labeldistill_on_merged": {"preset": "labeldistill_on_merged"},
        "10_source_activation": {"intensity_source": "activation"},
        "11_source_heatmap": {"intensity_source": "heatmap"},
        "12_source_mix": {"intensity_source": "mix"},
        "14_from_view": {"intensity_from": "view"},
        "15_receiver_camera": {"receiver": "camera"},
        "15_receiver_radar": {"receiver": "radar"},
        "16_no_partition": {"partition": "all", "stage1_partition": "all"},
        "16_rho_0": {"rho": 0.0},
        "16_max_only": {"intensity_max_share": 1.0},
        "16_mean_only": {"intensity_max_share": 0.0},
        "17_velocity": {"response_velocity_weight": 1.0},
    },
    "crkd": {
        "B1_resp": {"lambda_csrd": 0.0, "lambda_fused": 0.0, "lambda_cam": 0.0, "lambda_rel": 0.0, "calibration": False},
        "B2_csrd": {"lambda_fused": 0.0, "lambda_cam": 0.0, "lambda_rel": 0.0},
        "B3_msfd": {"lambda_rel": 0.0},
        "C1_task_logit_mean": {"csrd_target": "task_logit_mean"},
        "C3_class_max": {"csrd_target": "class_max"},
        "C4_no_calibration": {"calibration": False},
        "D1_box_mask": {"mask": "box"},
        "D3_gaussian_mask": {"mask": "gaussian"},
        "D5_ungated_camera": {"camera": "bev_camera"},
        "E1_gram": {"relation": "gram"},
        "E3_no_adapters": {"relation_adapters": False},
        "F1_uniform": {"group_weights": "uniform"},
        "F2_static": {"group_weights": "static"},
        "F3_no_velocity": {"velocity_weight": 0.0},
        "F3_velocity": {"velocity_weight": 1.0},
        "G1_paper": {"preset": "crkd_paper"},
    },
    "adaptive_smooth": {
        "02_mse": {"preset": "simdistill_like"},
        "03_l2c_only": {"lambda_m2m": 0.0, "lambda_srd": 0.0},
        "04_asd_both": {"lambda_srd": 0.0},
        "02_mse_conv_fuser": {"preset": "simdistill_like", "fuser": "concat"},
        "03_l2c_only_conv_fuser": {"lambda_m2m": 0.0, "lambda_srd": 0.0, "fuser": "concat"},
        "05_conv_fuser": {"lambda_srd": 0.0, "fuser": "concat"},
        "07_smooth_l1": {"pixel_loss": "smooth_l1"},
        "07_mse": {"pixel_loss": "mse"},
        "07_eta_0": {"eta": 0.0},
        "07_huber": {"huber": True},
        "07_variance": {"beta_rule": "variance"},
        "07_windows": {"granularity": True},
        "08_l2c_camera": {"l2c": "camera"},
        "08_mask_ones": {"m2m_mask": "ones"},
        "08_mask_objects": {"m2m_mask": "objects"},
        "09_quality_conf": {"quality": "conf"},
        "09_quality_label": {"quality": "label"},
        "09_quality_none": {"quality": "none"},
        "09_q_min_0": {"q_min": 0.0},
        "09_q_min_0.3": {"q_min": 0.3},
        "09_fp_tail": {"fp_tail": 0.1},
        "10_conv": {"fuser": "concat"},
        "10_two_gates": {"fuser": "gated"},
    },
    "dual_distill": {
        "02_mfd": {"lambda_crd": 0.0},
        "04_crd": {"lambda_mfd": 0.0},
        "05_up3conv": {"aligner": "up3conv"},
        "05_attn_only": {"aligner": "attn_only"},
        "05_ortho_only": {"aligner": "ortho_only"},
        "05_conv1": {"aligner": "conv1"},
        "06_target_gt": {"crd_target": "gt"},
        "06_tau_1": {"tau": 1.0},
        "06_tau_0.5": {"tau": 0.5},
        "06_dense": {"crd_target": "dense"},
        "07_no_fp": {"weight_fp": 0.0},
        "07_no_attention": {"attention": False},
        "07_no_spatial": {"weight_sp": 0.0},
        "08_fusion_teacher": {"teacher": "fusion"},
    },
}

# Rows of a preset that says the paper's weights, or none of which were tuned: no frozen weight is put below them.
OWN_WEIGHTS = ("crkd/G1_paper", "imkd/08_labeldistill_on_merged")

# The same on a changed student: name -> (changes of its configuration, options). Twins get the same student.
_CAMERA = {"radar": False}
STUDENT_ABLATIONS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "adaptive_smooth": {
        "10_no_bias": ({"sim_gate_bias": 0.0}, {}),
        "10_attended": ({"sim_added": "attended"}, {}),
        "10_sim_drop": ({"sim_drop": 0.1}, {}),
        "camera_02_mse_conv_fuser": (_CAMERA, {"preset": "simdistill_like", "fuser": "concat"}),
        "camera_03_l2c_only_conv_fuser": (_CAMERA, {"lambda_m2m": 0.0, "lambda_srd": 0.0, "fuser": "concat"}),
        "camera_05_conv_fuser": (_CAMERA, {"lambda_srd": 0.0, "fuser": "concat"}),
        "camera_05_asd_both": (_CAMERA, {"lambda_srd": 0.0}),
        "camera_06_full": (_CAMERA, {}),
    },
    "dual_distill": {"camera_02_mfd": (_CAMERA, {"lambda_crd": 0.0}), "camera_03_full": (_CAMERA, {})},
}

# Adaptive-Smooth's last row: a trained network scored with its simulated map (which holds the radar) taken away, or replaced
# by noise of the same mean and spread. The heterogeneous fuser promises to bear that better than a convolution.
SIM_AT_TEST: dict[str, tuple[str, str]] = {  # name -> (trained row, what the map becomes)
    "adaptive_smooth/11_sim_zeros": ("adaptive_smooth", "zeros"),
    "adaptive_smooth/11_sim_noise": ("adaptive_smooth", "noise"),
    "adaptive_smooth/11_conv_sim_zeros": ("adaptive_smooth/10_conv", "zeros"),
    "adaptive_smooth/11_conv_sim_noise": ("adaptive_smooth/10_conv", "noise"),
}
