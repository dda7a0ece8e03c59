"""imkd_data: raw camera-radar-LiDAR data -> cache -> batches."""
