# What every TiC-DataComp run shares; run_{scale}_{filter}_{method}.sh sets NAME, SCALE and METHOD and sources this file.
BENCHMARK=datacomp
DATA_DIR=${DATA_DIR:-data}
OUT=${OUTPUT_DIR:-results}/$NAME
RESAMPLED=${RESAMPLED:-1}

bash setup.sh
source scripts/loop.sh
