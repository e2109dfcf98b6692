// SPDX-License-Identifier: Apache-2.0
#include "cuda/complex_ema_scan_launchers.h"
