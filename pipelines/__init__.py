"""Custom diffusers pipelines, loadable with `custom_pipeline=`; installed as `gspn2_diffusion.pipelines`."""
