#pragma once
#include "cpu/support/sequence.h"
